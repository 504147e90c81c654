"""Problems for gated slot attention, solved by any backend on any device; used by CPU, interpreter and GPU tests."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtrain.kernels import gated_slot_attention
from tests.kernels.test_linear_attention import log_decays

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, slot, log_decay


@dataclass
class Problem:
    """Float32 numbers, so that every dtype computes on the same ones."""

    inputs: dict[str, Tensor]  # q, k, v, slot, log_decay and, where given, keys and values, the initial state
    gradients: dict[str, Tensor]  # of out, keys and values, where the loss has them
    options: dict[str, Any]

    def solve(self, dtype: torch.dtype, backend: str = "torch", device: str = "cpu") -> dict[str, Tensor]:
        """out, the states and the gradients of all inputs, by name."""
        inputs = {name: x.to(device, dtype, copy=True).requires_grad_() for name, x in self.inputs.items()}
        given: dict[str, Any] = {name: x for name, x in inputs.items() if name not in ("keys", "values")}
        if "keys" in inputs:
            given["initial_state"] = inputs["keys"], inputs["values"]
        out, state = gated_slot_attention(**given, **self.options, return_state=True, backend=backend)
        assert state is not None
        results = {"out": out, "keys": state[0], "values": state[1]}
        used = [results[name] for name in self.gradients]
        upstream = [x.to(device, results[name].dtype) for name, x in self.gradients.items()]
        found = torch.autograd.grad(used, list(inputs.values()), upstream, materialize_grads=True)
        results |= {f"d{name}": x for name, x in zip(inputs, found, strict=True)}
        return {name: x.detach().cpu() for name, x in results.items()}

    def rounded(self, dtype: torch.dtype) -> "Problem":
        """The same with numbers that `dtype` has."""
        inputs, gradients = (
            {name: x.to(dtype).float() for name, x in tensors.items()} for tensors in (self.inputs, self.gradients)
        )
        return Problem(inputs, gradients, self.options)


def problem(
    strength: str = "slow",
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int, int] = (5, 9, 7),
    documents: tuple[int, ...] | list[int] = (40, 0, 97),
    states: str = "both",
    batch: int | None = None,
    seed: int = 0,
) -> Problem:
    """heads: H, G; widths: K, V, M; documents: lengths of those packed into one row; or with `batch` of each row."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    (all_heads, groups), (key_width, value_width, slots) = heads, widths
    rows, tokens, count = (1, sum(documents), len(documents)) if batch is None else (batch, documents[0], batch)
    inputs = {
        "q": random(rows, tokens, groups, key_width),
        "k": random(rows, tokens, groups, key_width),
        "v": random(rows, tokens, all_heads, value_width),
        "slot": 0.3 * random(rows, tokens, all_heads, slots),  # over hundreds of tokens scores become large otherwise
        "log_decay": log_decays((rows, tokens, all_heads, slots), strength, generator),
    }
    keys, values = (count, all_heads, key_width, slots), (count, all_heads, slots, value_width)
    gradients = {"out": random(rows, tokens, all_heads, value_width)}
    if states == "both":
        inputs |= {"keys": random(*keys), "values": random(*values)}
        gradients |= {"keys": random(*keys), "values": random(*values)}
    options: dict[str, Any] = {"scale": 0.4}
    if batch is None:
        options["cu_seqlens"] = torch.tensor([0, *documents]).cumsum(0)
    return Problem(inputs, gradients, options)


def errors(got: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, relative to the largest number in it."""
    found = {}
    assert got.keys() == true.keys()
    for name, x in true.items():
        y = got[name].double()
        assert y.shape == x.shape and y.isfinite().all(), name
        found[name] = float((y - x).abs().max() / x.abs().max().clamp_min(1e-30)) if x.numel() else 0.0
    return found


def assert_close_to_reference(this: Problem, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """float64: rounding; float32: at most 4 times what autograd through the reference loses in it."""
    true = this.solve(torch.float64, "reference")
    found = errors(this.solve(dtype, backend, device), true)
    if dtype == torch.float64:
        assert max(found.values()) <= 1e-10, found
        return
    allowed = errors(this.solve(dtype, "reference"), true)
    assert all(error <= max(4 * allowed[name], 5e-6) for name, error in found.items()), (found, allowed)
