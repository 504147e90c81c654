"""Problems for the gated delta rule, on any device, and what its results are compared with."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels import gated_delta_rule
from longtrain.kernels.gated_delta_rule import stages
from tests.kernels.test_linear_attention import errors, log_decays

GATES = ["none", "token", "channel"]
# Bad numbers, each for a document of a head: see reach.py.
PLACES = [
    *(("k", torch.nan), ("v", torch.inf), ("q", torch.nan), ("beta", torch.nan)),
    *(("dout", torch.nan), ("initial_state", torch.inf), ("dstate", torch.nan), ("k", -torch.inf)),
]


@dataclass
class Problem:
    """Float32 inputs and output gradients, so that every dtype computes on the same numbers."""

    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of out and state, where the loss has them
    options: dict[str, Any]

    def solve(self, dtype: torch.dtype, backend: str = "torch", device: str = "cpu") -> dict[str, Tensor]:
        """out, the state and the gradients of all inputs, by name."""
        leaves: dict[str, Any] = {
            name: x.to(device, dtype, copy=True).requires_grad_() for name, x in self.inputs.items()
        }
        out, state = gated_delta_rule(**leaves, **self.options, return_state=True, backend=backend)
        assert state is not None
        results = {"out": out, "state": state}
        used = [results[name] for name in self.gradients]
        upstream = [x.to(device, results[name].dtype) for name, x in self.gradients.items()]
        found = torch.autograd.grad(used, list(leaves.values()), upstream, materialize_grads=True)
        results |= {f"d{name}": x for name, x in zip(leaves, found, strict=True)}
        return {name: x.detach().cpu() for name, x in results.items()}

    def rounded(self, dtype: torch.dtype) -> "Problem":
        """The problem whose numbers are those that `dtype` has of this one's."""
        inputs = {name: x.to(dtype).float() for name, x in self.inputs.items()}
        return Problem(inputs, {name: x.to(dtype).float() for name, x in self.gradients.items()}, self.options)


def problem(
    gate: str = "token",
    strength: str = "slow",
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int] = (5, 9),
    documents: tuple[int, ...] | list[int] = (40, 0, 97),
    states: str = "both",
    betas: str = "sigmoid",
    batch: int | None = None,
    seed: int = 0,
) -> Problem:
    """documents: lengths of those packed into one row; or with `batch` the one length of each row.

    betas: between 0 and 1 ("sigmoid"), or between -0.3 and 2 with some that are just 0, 1 or 2 ("any").
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    (all_heads, groups), (key_width, value_width) = heads, widths
    rows, tokens, count = (1, sum(documents), len(documents)) if batch is None else (batch, documents[0], batch)
    k = random(rows, tokens, groups, key_width)
    beta = torch.sigmoid(random(rows, tokens, all_heads))
    if betas == "any":
        beta = torch.where(beta < 0.4, (5 * beta).round().clamp(max=2), 2.3 * beta - 0.6)
    inputs = {
        "q": random(rows, tokens, groups, key_width),
        # Not of length 1, but near it.
        "k": k / k.norm(dim=-1, keepdim=True).clamp_min(0.1) * (1 + 0.05 * random(rows, tokens, groups, 1)),
        "v": random(rows, tokens, all_heads, value_width),
        "beta": beta,
    }
    shapes = {"token": (rows, tokens, all_heads), "channel": (rows, tokens, all_heads, key_width)}
    if gate != "none":
        inputs["log_decay"] = log_decays(shapes[gate], strength, generator)
    options: dict[str, Any] = {"scale": 0.7}
    if states == "both":
        inputs["initial_state"] = random(count, all_heads, key_width, value_width)
    if batch is None:
        options["cu_seqlens"] = torch.tensor([0, *documents]).cumsum(0)
    gradients = {"out": random(*inputs["v"].shape), "state": random(count, all_heads, key_width, value_width)}
    if states == "neither":
        gradients.pop("state")
    return Problem(inputs, gradients, options)


def problem_of(case: dict[str, Any]) -> Problem:
    """The problem of a case; documents that are all alike and not empty become rows of a batch."""
    documents = case["documents"]
    batch = len(documents) if len(set(documents)) == 1 else None
    return problem(**case, batch=batch)


def own_gradients(this: Problem) -> dict[str, Tensor]:
    """Tokens with a bad number [T, H], whose own gradients of beta, v and log_decay may be reached or not."""
    tokens = [
        x.flatten(3).isfinite().all(-1)[0] if x.ndim > 3 else x.isfinite()[0]
        for name, x in this.inputs.items()
        if name in ("k", "v", "beta", "log_decay")
    ]
    bad = ~torch.stack(tokens).all(0)
    return dict.fromkeys(("dv", "dbeta", "dlog_decay"), bad)


def assert_float32_loses_little(got: dict[str, Tensor], this: Problem, true: dict[str, Tensor] | None = None) -> None:
    """At most four times what the reference loses in float32."""
    true = this.solve(torch.float64, "reference") if true is None else true
    allowed = errors(this.solve(torch.float32, "reference"), true)
    for name, error in errors(got, true).items():
        assert error <= max(4 * allowed[name], 5e-6), (name, error, allowed[name])


def assert_pieces_are_the_whole(
    gate: str,
    cut: int,
    groups: int,
    backend: str,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    tokens: int = 150,
    heads: int = 4,
    batch: int = 2,
) -> None:
    """Two pieces joined by their summaries alone, as two ranks would do it, give what one piece gives.

    Decays are slow, so that what the first piece hands on matters to all of the second.
    """
    allowed = 1e-10 if dtype == torch.float64 else 2e-5
    this = problem(gate, heads=(heads, groups), documents=[tokens], batch=batch)
    given = {name: x.to(device, dtype) for name, x in this.inputs.items()}
    tensors = (*(given[name] for name in ("q", "k", "v", "beta")), given.get("log_decay"))
    initial, dfinal = given["initial_state"][:, None], this.gradients["state"].to(device, dtype)[:, None]
    dout = this.gradients["out"].to(device, dtype)
    forward_of, backward_of = stages(backend)
    torch_forward, torch_backward = stages("torch")
    whole, parts = np.array([0, tokens]), np.array([0, cut, tokens])
    wide = tuple(None if x is None else x.double() for x in tensors)
    out, final = torch_forward(*wide, whole, scale=0.7).finish(initial.double())
    need = {"need_decay_gradient": gate != "none"}
    true = torch_backward(*wide, whole, dout.double(), scale=0.7).finish(initial.double(), dfinal.double(), **need)

    def same(got: Tensor | None, expected: Tensor | None) -> None:
        if got is None or expected is None:
            assert got is expected
            return
        assert got.shape == expected.shape and got.dtype == dtype
        error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error <= allowed, float(error)

    forward = forward_of(*tensors, parts, scale=0.7)
    transition, state = forward.summaries()
    assert transition.shape == (batch, 2, heads, 5, 5) and transition.dtype == dtype
    middle = transition[:, 0] @ initial[:, 0] + state[:, 0]
    same(transition[:, 1] @ middle + state[:, 1], final[:, 0])
    entering = torch.stack((initial[:, 0], middle), 1)
    forward.local()
    found, leaving = forward.finish(entering)
    same(found, out)
    same(leaving, torch.stack((middle.double(), final[:, 0]), 1))
    assert torch.equal(forward_of(*tensors, parts, scale=0.7).finish(entering)[0], found)

    backward = backward_of(*tensors, parts, dout, scale=0.7)
    dstates = backward.summaries()
    dmiddle = transition[:, 1].transpose(2, 3) @ dfinal[:, 0] + dstates[:, 1]
    backward.local(entering)
    staged = *gradients, dentering = backward.finish(entering, torch.stack((dmiddle, dfinal[:, 0]), 1), **need)
    for gradient, x in zip((*gradients, dentering[:, :1]), true, strict=True):
        same(gradient, x)
    same(dentering[:, 1], dmiddle.double())
    same(transition[:, 0].transpose(2, 3) @ dmiddle + dstates[:, 0], true[-1][:, 0])
    unstaged = backward_of(*tensors, parts, dout, scale=0.7)
    *gradients, nothing = unstaged.finish(
        entering, torch.stack((dmiddle, dfinal[:, 0]), 1), **need, need_state_gradient=False
    )
    assert nothing is None
    for gradient, x in zip(gradients, staged[:-1], strict=True):
        assert gradient is x is None or torch.equal(gradient, x)
