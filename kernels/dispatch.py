"""Which backend runs an operator, and why: the one table that every public function asks.

A backend that cannot do what a call asks for refuses it (ValueError); nothing is switched silently.
"""

import torch

# operator -> backend -> what it is. "auto" takes the first one named.
_BACKENDS: dict[str, dict[str, str]] = {
    "softmax_attention": {
        "torch": "tiles over the visible (query, key) pairs, memory linear in T: PyTorch's native flash tile on a CPU "
        "without softcap, matrix products elsewhere",
        "reference": "the dense softmax, memory T x S: it defines what is right",
    },
    "linear_attention": {
        "torch": "chunks of tokens as matrix products, memory linear in T",
        "reference": "the recurrence token by token: it defines what is right",
    },
}


def choose_backend(operator: str, requested: str, *, device: torch.device | str) -> str:
    """The backend that runs `operator` on `device` for the caller's `backend=requested`; "auto" takes the fastest.

    Raises ValueError naming the backends that would work, where `requested` is not one of them.
    """
    known = _BACKENDS[operator]
    if requested == "auto":
        return next(iter(known))
    if requested not in known:
        names = ", ".join(repr(name) for name in ("auto", *known))
        raise ValueError(f"backend: got {requested!r}, expected for {operator} on {torch.device(device).type}: {names}")
    return requested


def explain(operator: str, *, backend: str = "auto", device: torch.device | str = "cpu") -> str:
    """Say which backend runs a call of `operator` on `device`, what it is, and which others there are.

        >>> print(explain("softmax_attention", device="cuda"))

    Raises ValueError for an operator that does not exist or a backend that cannot run it.
    """
    if operator not in _BACKENDS:
        raise ValueError(f"operator: got {operator!r}, expected one of {', '.join(map(repr, _BACKENDS))}")
    chosen = choose_backend(operator, backend, device=device)
    lines = [f"{operator} with backend={backend!r} on {torch.device(device).type} runs {chosen!r}: "]
    lines[0] += _BACKENDS[operator][chosen]
    lines += [f"  also there: {name!r}: {what}" for name, what in _BACKENDS[operator].items() if name != chosen]
    return "\n".join(lines)
