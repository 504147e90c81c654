"""Recompute and offload on a card: the same gradients bitwise, and what the card holds between the passes."""

import pytest
import torch

from longtrain.layers.pattern import LayersConfig
from longtrain.memory import MemoryConfig
from longtrain.model import Decoder, ModelConfig
from longtrain.parallel import SequenceShard

pytestmark = pytest.mark.gpu

LENGTH, WIDTH, DEPTH = 16_384, 512, 6
INPUT = LENGTH * WIDTH * 2  # bytes of one layer's input in bfloat16
POLICIES = [
    MemoryConfig(recompute="attention"),
    MemoryConfig(recompute="attention", offload="inputs", offload_in_flight=1),
    MemoryConfig(recompute="attention", offload="attention", offload_in_flight=2),
    MemoryConfig(recompute="full", offload="inputs", offload_in_flight=3),
]


def _passes(memory: MemoryConfig) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients by name in host memory, and the bytes that the card held more after forward, and at the most."""
    torch.manual_seed(3)
    layers = LayersConfig(pattern=["softmax", "gated_deltanet"], mixers={})
    with torch.device("cuda"):
        model = Decoder(ModelConfig(width=WIDTH, depth=DEPTH), layers, vocabulary=257, memory=memory)
        torch.nn.init.normal_(model.head.weight, std=0.2)  # zero at the start of a training, it would hide the rest
        model.to(torch.bfloat16)
        tokens, labels = (torch.randint(257, (1, LENGTH)) for _ in range(2))
    shard = SequenceShard(LENGTH)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = model(tokens, shard, labels)
    assert isinstance(losses, torch.Tensor)
    torch.cuda.synchronize()
    after_forward = torch.cuda.memory_allocated() - before
    losses.sum().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = {
        name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return gradients, after_forward, peak


def test_policies_and_offload_give_the_same_gradients_and_take_less_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
    torch.use_deterministic_algorithms(True)
    try:
        truth, held, peak = _passes(MemoryConfig())
        found = [_passes(memory) for memory in POLICIES]
    finally:
        torch.use_deterministic_algorithms(False)
    for memory, (gradients, _, _) in zip(POLICIES, found, strict=True):
        assert gradients.keys() == truth.keys()
        assert all(torch.equal(gradients[name], wanted) for name, wanted in truth.items()), memory
    after = [after_forward for _, after_forward, _ in found]
    assert after[0] < held / 2 and all(most < peak for _, _, most in found)
    # Without inputs on the card, nothing of their size is left per layer; without attention's results, less still.
    assert after[1] <= after[0] - (DEPTH - 1) * INPUT
    assert after[2] <= after[1] - (DEPTH // 2 - 1) * INPUT
    assert after[3] < 2 * INPUT
