"""Checks that cost time: on a GPU they make the host wait for the device, so they run only where asked for.

    with longtrain.debug.checks():
        out, state = linear_attention(q, k, v, log_decay)   # also refuses a positive log_decay on a GPU

On CPU such checks cost little and always run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# A context variable, not a global: a thread or task that turns the checks on turns them on for itself alone.
_checks: ContextVar[bool] = ContextVar("longtrain_checks", default=False)


@contextmanager
def checks(on: bool = True) -> Iterator[None]:
    """Turn the costly checks on (or off, with `on=False`) for the calls inside the `with` block.

    The setting belongs to the calling thread. Autograd runs backward passes of CUDA tensors in threads of its own, so
    a check belongs into an operator's forward pass.
    """
    token = _checks.set(on)
    try:
        yield
    finally:
        _checks.reset(token)


def enabled() -> bool:
    """Say whether the costly checks are on here; operators ask before a check that would make a GPU wait."""
    return _checks.get()
