"""Which backend runs an operator, and why: the one table that every public function asks.

A backend that cannot do what a call asks for refuses it (ValueError, with the reason); nothing is switched silently.
"auto" takes the first backend of the operator's list that can, and `explain` tells which one that is and why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from longtrain.kernels import launching

# Why a backend cannot run a call on a device in a dtype with these widths; None where it can.
Refusal = Callable[[torch.device, torch.dtype | None, Mapping[str, int]], str | None]

WIDEST = 256  # heads of the Triton kernels


def _no_triton(device: torch.device, dtype: torch.dtype | None, widths: Mapping[str, int]) -> str | None:
    if (reason := launching.refusal(device)) is not None:
        return reason
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, not in float64"
    for name, width in widths.items():
        if width > WIDEST:
            return f"the Triton kernels take {name} up to {WIDEST}, not {width}"
    return None


def _not_for(*types: str) -> Refusal:
    def refuse(device: torch.device, dtype: torch.dtype | None, widths: Mapping[str, int]) -> str | None:
        return f"on {device.type} it would be slower than the others" if device.type in types else None

    return refuse


def _only_cpu(device: torch.device, dtype: torch.dtype | None, widths: Mapping[str, int]) -> str | None:
    return None if device.type == "cpu" else "its native tile runs on a CPU only; without it chunks need less memory"


def _never(device: torch.device, dtype: torch.dtype | None, widths: Mapping[str, int]) -> None:
    return None


@dataclass(frozen=True)
class _Backend:
    what: str
    refuses: Refusal = _never
    auto: Refusal = _never  # why "auto" passes over it although it could


_TRITON = "Triton kernels"
_INTERPRETER = _not_for("cpu")  # only Triton's interpreter runs there

# operator -> backend -> what it is. "auto" takes the first one that can and need not be passed over.
_BACKENDS: dict[str, dict[str, _Backend]] = {
    "softmax_attention": {
        "triton": _Backend(f"{_TRITON} on blocks of visible (query, key) pairs", _no_triton, _INTERPRETER),
        "torch": _Backend(
            "tiles over the visible (query, key) pairs, memory linear in T: PyTorch's native flash tile on a CPU "
            "without softcap, matrix products elsewhere",
            auto=_only_cpu,
        ),
        "chunked": _Backend(
            "chunks of queries and keys, made again in backward, as matrix products: memory linear in T and the least "
            "of all, on any device"
        ),
        "reference": _Backend("the dense softmax, memory T x S: it defines what is right"),
    },
    "linear_attention": {
        "triton": _Backend(f"{_TRITON} on chunks of tokens", _no_triton, _INTERPRETER),
        "torch": _Backend("chunks of tokens as matrix products, memory linear in T"),
        "reference": _Backend("the recurrence token by token: it defines what is right"),
    },
    "gated_delta_rule": {
        "triton": _Backend(f"{_TRITON} on chunks of tokens in WY form", _no_triton, _INTERPRETER),
        "torch": _Backend("chunks of tokens in WY form as matrix products, memory linear in T"),
        "reference": _Backend("the recurrence token by token: it defines what is right"),
    },
    "gated_slot_attention": {
        "triton": _Backend("two passes of the linear attention kernels joined by a softmax", _no_triton, _INTERPRETER),
        "torch": _Backend("two passes of linear attention by chunks joined by a softmax"),
        "reference": _Backend("the recurrence token by token: it defines what is right"),
    },
    "causal_conv1d": {
        "triton": _Backend(f"{_TRITON}, one for each direction", _no_triton, _INTERPRETER),
        "torch": _Backend("a sum of shifted products"),
        "reference": _Backend("the sum token by token: it defines what is right"),
    },
    "rms_norm": {
        "torch": _Backend("tiles of tokens; torch's fused kernels on a GPU, where x and weight have one dtype"),
        "reference": _Backend("the equation as it stands: it defines what is right"),
    },
    "rotary": {
        "torch": _Backend("tiles of tokens, angles in float64"),
        "reference": _Backend("products of complex numbers: it defines what is right"),
    },
    "swiglu": {
        "torch": _Backend("PyTorch's silu and its gradient, written in place"),
        "reference": _Backend("the equation as it stands: it defines what is right"),
    },
    "tiled_mlp": {
        "torch": _Backend("a tile of tokens at a time, PyTorch's matrix products"),
        "reference": _Backend("all tokens at once: it defines what is right"),
    },
    "linear_cross_entropy": {
        "triton": _Backend(f"{_TRITON} on the logits of a chunk of tokens", _no_triton, _INTERPRETER),
        "torch": _Backend("chunks of tokens and vocabulary; the logits are never whole"),
        "reference": _Backend("all logits at once: it defines what is right"),
    },
}


def choose_backend(
    operator: str,
    requested: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    widths: Mapping[str, int] | None = None,
) -> str:
    """The backend that runs `operator` on `device` for the caller's `backend=requested`; "auto" takes the fastest.

    dtype: the widest of the inputs; widths: sizes that a backend may limit, by name ("K", "V"). Raises ValueError
    naming the backends that would work, where `requested` is not one of them.
    """
    known, device = _BACKENDS[operator], torch.device(device)
    refusals = {name: backend.refuses(device, dtype, widths or {}) for name, backend in known.items()}
    if requested == "auto":
        passed_over = {name: backend.auto(device, dtype, widths or {}) for name, backend in known.items()}
        return next(name for name in known if refusals[name] is None and passed_over[name] is None)
    if requested in known and refusals[requested] is None:
        return requested
    names = ", ".join(repr(name) for name in ("auto", *known) if refusals.get(name) is None)
    reason = f" ({refusals[requested]})" if requested in known else ""
    raise ValueError(f"backend: got {requested!r}{reason}, expected for {operator} on {device.type}: {names}")


def explain(
    operator: str,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    widths: Mapping[str, int] | None = None,
) -> str:
    """Say which backend runs a call of `operator` on `device`, what it is, and why not the others.

    dtype and widths (``{"K": 128, "V": 256}``) where the answer depends on them.

        >>> print(explain("softmax_attention", device="cuda", dtype=torch.bfloat16))

    Raises ValueError for an operator that does not exist or a backend that cannot run it.
    """
    if operator not in _BACKENDS:
        raise ValueError(f"operator: got {operator!r}, expected one of {', '.join(map(repr, _BACKENDS))}")
    known, device = _BACKENDS[operator], torch.device(device)
    chosen = choose_backend(operator, backend, device=device, dtype=dtype, widths=widths)
    lines = [f"{operator} with backend={backend!r} on {device.type} runs {chosen!r}: {known[chosen].what}"]
    for name, other in known.items():
        if name != chosen:
            asked = device, dtype, widths or {}
            reason = other.refuses(*asked)
            said = f"cannot run here: {reason}" if reason else f"also there: {other.what}"
            if not reason and (why := other.auto(*asked)):
                said += f" ({why})"
            lines.append(f"  {name!r} {said}")
    return "\n".join(lines)
