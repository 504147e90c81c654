"""Mixers with the weights of transformers' plain PyTorch layers: the same outputs."""

from typing import Any

import pytest
import torch

from longtrain.layers import MIXERS, LayerPlace
from longtrain.parallel import SequenceShard


@pytest.mark.parametrize("layer", [0, 2])
def test_lightning_is_minimax(layer: int) -> None:
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    depth, heads, width = 3, 4, 8
    theirs = MiniMaxLightningAttention(
        MiniMaxConfig(
            hidden_size=32,
            num_attention_heads=heads,
            num_hidden_layers=depth,
            block_size=16,
            layer_types=["linear_attention"] * depth,
        ),
        layer,
    )
    options = {"heads": heads, "decay": "minimax", "norm": "learned", "value_silu": True, "scale": 1.0}
    kind = MIXERS["lightning"]
    ours: Any = kind(kind.Config(**options), LayerPlace(width=32, index=layer, depth=depth))
    torch.manual_seed(0)
    with torch.no_grad():
        theirs.norm.weight.uniform_(0.5, 1.5)
        # Theirs is q, k, v of the first head, then of the next; ours q of all heads, then k, v and the gate.
        by_head = theirs.qkv_proj.weight.view(heads, 3, width, 32)
        ours.qkvg.weight.copy_(torch.cat([*by_head.transpose(0, 1).flatten(1, 2), theirs.output_gate.weight]))
        ours.norm.weight.copy_(theirs.norm.weight)
        ours.out.weight.copy_(theirs.out_proj.weight)
        x = torch.randn(2, 43, 32)
        wanted, _ = theirs(x, position_embeddings=None, attention_mask=None)
        found = ours(x, SequenceShard(length=43))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
def test_gated_deltanet_is_qwen3_next(heads: int, key_heads: int) -> None:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    options = {"heads": heads, "key_heads": key_heads, "key_width": 8, "value_width": 12, "conv_width": 4}
    torch.manual_seed(0)
    theirs = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=32,
            num_hidden_layers=4,
            linear_num_value_heads=heads,
            linear_num_key_heads=key_heads,
            linear_key_head_dim=8,
            linear_value_head_dim=12,
            linear_conv_kernel_dim=4,
            rms_norm_eps=1e-6,
        ),
        0,
    )
    kind = MIXERS["gated_deltanet"]
    ours: Any = kind(kind.Config(**options), LayerPlace(width=32, index=0, depth=4))
    with torch.no_grad():
        theirs.norm.weight.uniform_(0.5, 1.5)
        theirs.A_log.uniform_(-3, 0)  # slow
        # Theirs is, key head by key head, its q, k, and the v and z of the value heads that share it.
        shares = theirs.in_proj_qkvz.weight.view(key_heads, -1, 32)
        q, k, v, z = shares.split((8, 8, 12 * heads // key_heads, 12 * heads // key_heads), dim=1)
        ours.qkv.weight.copy_(torch.cat([part.flatten(0, 1) for part in (q, k, v)]))
        ours.gate.weight.copy_(z.flatten(0, 1))
        beta_and_rate = theirs.in_proj_ba.weight.view(key_heads, 2, -1, 32)
        ours.rates.weight.copy_(beta_and_rate.transpose(0, 1).reshape(2 * heads, 32))
        ours.convolution.weight.copy_(theirs.conv1d.weight)
        ours.decay.A_log.copy_(theirs.A_log)
        ours.decay.dt_bias.copy_(theirs.dt_bias)
        ours.norm.weight.copy_(theirs.norm.weight)
        ours.out.weight.copy_(theirs.out_proj.weight)
        x = torch.randn(2, 43, 32)
        torch.testing.assert_close(ours(x, SequenceShard(length=43)), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (8, 4)])
def test_mamba2_is_mamba2(heads: int, groups: int) -> None:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=32,
            num_hidden_layers=1,
            num_heads=heads,
            head_dim=64 // heads,
            state_size=16,
            n_groups=groups,
            chunk_size=16,
        ),
        0,
    )
    kind = MIXERS["mamba2"]
    ours: Any = kind(kind.Config(heads=heads, groups=groups, state_width=16), LayerPlace(width=32, index=0, depth=1))
    with torch.no_grad():
        theirs.norm.weight.uniform_(0.5, 1.5)
        theirs.D.normal_()
        ours.inputs.weight.copy_(theirs.in_proj.weight)
        ours.convolution.weight.copy_(theirs.conv1d.weight)
        assert ours.convolution.bias is not None and theirs.conv1d.bias is not None
        ours.convolution.bias.copy_(theirs.conv1d.bias.normal_())
        ours.decay.A_log.copy_(theirs.A_log)
        ours.decay.dt_bias.copy_(theirs.dt_bias)
        ours.skip.copy_(theirs.D)
        ours.norm.copy_(theirs.norm.weight)
        ours.out.weight.copy_(theirs.out_proj.weight)
        x = torch.randn(2, 43, 32)
        torch.testing.assert_close(ours(x, SequenceShard(length=43)), theirs(x), rtol=1e-5, atol=1e-5)
