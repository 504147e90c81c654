"""How much memory is held, for what, and when it is most: torch's memory tracker with the terms of a training step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed._tools.mem_tracker import MemTracker, _RefType
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_TOTAL = "Total"  # torch's name for the sum


class Term(_RefType):
    """What memory is held for. The values are `longtrain.dry_run.TERMS`."""

    WEIGHTS = "weights"  # this rank's share
    GRADIENTS = "gradients"  # this rank's share
    OPTIMIZER = "optimizer"  # its state
    GATHERED = "gathered weights"  # whole weights of the layers that run, and gradients on their way to their owners
    INPUTS = "layer inputs"  # x as it enters each block
    ATTENTION = "kept attention"  # what the registered operators over ranks return: out, lse, states
    RING = "ring buffers"  # what those hold inside: keys and values under way, running results, summaries of segments
    LOSS = "loss"  # what linear_cross_entropy holds inside
    WORKING = "working set"  # all else: what one layer needs while it runs, or keeps if nothing is recomputed


class Tracker(MemTracker):
    """Follows every storage from when it is made until it is gone; its term is that of the code that made it.

    device: whose memory is counted by term; of the host's, what was pinned or copied there is counted beside it. Of
    torch's tracker this keeps the account of storages and leaves out what follows modules: terms do not.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._ref_class = Term
        self._device = device
        self._now = Term.WORKING
        self._muted = False
        self.host_peak = 0
        """Most bytes held on the host, for a device that is not the host."""

    def __enter__(self) -> "Tracker":
        if self._depth == 0:
            self._fake_mode_on_entry = active_fake_mode()
            self._track_resize()
        TorchDispatchMode.__enter__(self)
        self._depth += 1
        return self

    def __exit__(self, *exception: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore_resize()
        TorchDispatchMode.__exit__(self, *exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its parts come back here
        result = func(*args, **kwargs or {})
        if self._muted or active_fake_mode() is not self._fake_mode_on_entry:
            return result
        for x in tree_flatten(result)[0]:
            if isinstance(x, Tensor):
                self._track(self._now, x)
        self._update_peaks()
        return result

    # ---- terms ------------------------------------------------------------------------------------------------------

    @contextmanager
    def making(self, term: Term) -> Iterator[None]:
        """What is made inside the block is for `term`, whatever calls what there."""
        before = self._now
        self._now = term if before is Term.WORKING else before
        try:
            yield
        finally:
            self._now = before

    @property
    def idle(self) -> bool:
        """Whether nothing special is being made."""
        return self._now is Term.WORKING

    @contextmanager
    def muted(self) -> Iterator[None]:
        """What is made inside the block is no memory: DTensor works out the shapes of whole tensors there."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    def mark(self, tensors: Any, term: Term) -> None:
        """These tensors are for `term` from now on."""
        for x in tree_flatten(tensors)[0]:
            if isinstance(x, Tensor) and x.device == self._device:
                self._update_and_maybe_create_winfos(x, term)

    # ---- what was held ----------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Forget the peaks: they start again from what is held now."""
        self._peak_mem.clear()
        self._peak_mem_snap.clear()
        self._update_peaks()

    def held(self) -> dict[str, int]:
        """Bytes held now, by term, and "total"."""
        return _by_name(self._curr_mem_snap.get(self._device, {}))

    def peak(self) -> dict[str, int]:
        """Bytes by term, and "total", when the total was largest."""
        return _by_name(self._peak_mem_snap.get(self._device, {}))

    def _update_peaks(self) -> None:
        now = self._curr_mem_snap.get(self._device)
        if now is not None and now[_TOTAL] > self._peak_mem.get(self._device, 0):
            self._peak_mem[self._device] = now[_TOTAL]
            self._peak_mem_snap[self._device] = dict(now)
        if self._device.type != "cpu":
            host = self._curr_mem_snap.get(torch.device("cpu"), {})
            self.host_peak = max(self.host_peak, host.get(_TOTAL, 0))


def _by_name(snapshot: dict[Any, int]) -> dict[str, int]:
    return {term.value: snapshot.get(term, 0) for term in Term} | {"total": snapshot.get(_TOTAL, 0)}
