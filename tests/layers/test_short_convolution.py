"""The short convolution of mixers, and what the mixers that have gates by token refuse."""

import pytest
import torch

from longtrain.layers import MIXERS, LayerPlace
from longtrain.layers.selective import SelectiveDecay
from longtrain.layers.short_convolution import ShortConvolution
from longtrain.parallel import SequenceShard
from tests.layers.references.pieces import convolved

PLACE = LayerPlace(width=32, index=0, depth=2)


@pytest.mark.parametrize("width", [None, 1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_in_pieces_and_steps_it_is_the_loop(width: int | None, bias: bool) -> None:
    torch.manual_seed(0)
    layer = ShortConvolution(6, width, bias=bias).double()
    if layer.bias is not None:
        layer.bias.normal_()
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    wanted = torch.stack([convolved(layer, row) for row in x])
    state, pieces = layer.empty_state((2, 1, 1, 1), "cpu", x.dtype).inputs, []
    for piece in x.split((5, 1, 0, 2, 1, 1, 1), dim=1):
        y, state = layer(piece, SequenceShard(length=piece.shape[1]), state)
        pieces.append(y)
        assert state is not None
        # What is kept is no view of a long piece.
        assert state.untyped_storage().nbytes() == 2 * ((width or 1) - 1) * 6 * 8
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=0, atol=1e-12)
    whole, after = layer(x, SequenceShard(length=11), None)
    assert after is None
    torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_step_in_half_precision_is_computed_in_single() -> None:
    torch.manual_seed(0)
    layer = ShortConvolution(64, 4, bias=True)
    x = torch.randn(1, 4, 64, dtype=torch.bfloat16)
    y, _ = layer(x[:, 3:], SequenceShard(length=1), x[:, :3])
    assert y.dtype == torch.bfloat16
    # Rounded once, at the end.
    assert torch.equal(y[0, 0], convolved(layer, x[0].float())[3].bfloat16())


@torch.no_grad()
def test_first_decays_are_slow_and_of_many_kinds() -> None:
    torch.manual_seed(0)
    _, log_decay = SelectiveDecay(64, 8)(torch.zeros(1, 1, 512))
    assert log_decay.shape == (1, 1, 64, 8)
    assert -1.61 < float(log_decay.min()) < -0.5 and -0.01 < float(log_decay.max()) < -0.0009


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("deltanet", {"conv_width": 0}, ("conv_width: got 0", "at least 1")),
        ("deltanet", {"head_width": 0}, ("head_width: got 0", "at least 1")),
        ("gated_deltanet", {"conv_width": 0}, ("conv_width: got 0", "at least 1")),
        ("gated_deltanet", {"heads": 4, "key_heads": 3}, ("key_heads: got 3", "divide heads = 4")),
        ("gated_deltanet", {"heads": 4, "key_heads": 0}, ("key_heads: got 0", "divide heads = 4")),
        ("gated_deltanet", {"key_width": 0}, ("key_width: got 0", "at least 1")),
        ("gated_deltanet", {"value_width": 0}, ("value_width: got 0", "at least 1")),
        ("kimi_delta", {"conv_width": -1}, ("conv_width: got -1", "at least 1")),
        ("kimi_delta", {"rank": 0}, ("rank: got 0", "at least 1")),
        ("mamba2", {"conv_width": 0}, ("conv_width: got 0", "at least 1")),
        ("mamba2", {"heads": 4, "groups": 3}, ("groups: got 3", "divide heads = 4")),
        ("mamba2", {"heads": 4, "groups": 0}, ("groups: got 0", "divide heads = 4")),
        ("mamba2", {"state_width": 0}, ("state_width: got 0", "at least 1")),
        ("mamba2", {"expand": 0}, ("expand: got 0", "at least 1")),
        ("mamba2", {"heads": 48}, ("heads: got 48", "divide expand * model.width = 64")),
        ("gsa", {"slots": 0}, ("slots: got 0", "at least 1")),
        ("gsa", {"damping": 0.0}, ("damping: got 0.0", "above 0")),
        ("gsa", {"kv_heads": 3}, ("kv_heads: got 3", "divide heads = 4")),
        ("gsa", {"activation": "relu"}, ("activation: got 'relu'", "silu, none")),
        ("gsa", {"rope_base": 1.0}, ("rope_base: got 1.0", "above 1")),
        ("gsa", {"rope_base": 9.0, "head_width": 5}, ("head_width: got 5", "even number")),
        ("gsa", {"damping": float("nan")}, ("damping: got nan", "above 0")),
    ],
)
def test_options_that_cannot_work_are_refused(name: str, options: dict, parts: tuple[str, ...]) -> None:
    kind = MIXERS[name]
    with pytest.raises(ValueError) as refusal:
        kind.check(kind.Config(**options), PLACE)
    assert all(part in str(refusal.value) for part in parts)
