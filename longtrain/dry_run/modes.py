"""What torch's dispatch is told in a dry run: which tensors are real, what runs, and what a number would be.

Three modes lie on each other. `Program`, on top, lets host data be real (positions, intervals, boundaries: everything
made from nothing but real tensors on the CPU), opens registered operators, so that what their bodies allocate is seen,
and answers where the program asks a fake tensor for a number. The tracker sees what is left, and `Fakes` makes it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from longtrain.dry_run.tracker import Term, Tracker

_aten = torch.ops.aten
_COMPARISONS = (_aten.equal.default, _aten.allclose.default)
_NUMBERS = (_aten._local_scalar_dense.default, _aten.item.default, _aten.is_nonzero.default, *_COMPARISONS)
# The program's tests of its numbers: those that do not exist are finite, and none is wrong.
_TESTS = {_aten.any: False, _aten.all: True, _aten.isfinite: True}

# Registered operators, by the beginnings of their names: what their bodies hold, beside their results.
_OPENED = {
    "longtrain::sequence_parallel_": Term.RING,
    "longtrain::linear_cross_entropy": Term.LOSS,
    "longtrain::": Term.WORKING,
}
_KEPT = "longtrain::sequence_parallel_"  # whose forward results recompute may keep


class Fakes(FakeTensorMode):
    """Fake tensors, on devices that are never touched."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    @property
    def avoid_device_init(self) -> bool:
        return True  # our device is available, and there is nothing in it that could be initialised


class Program(TorchDispatchMode):
    """The topmost mode; see the file's head.

    device: where the program's tensors live, the dry device or the CPU. fakes: None where all tensors are real.
    """

    def __init__(self, device: torch.device, fakes: Fakes | None, tracker: Tracker) -> None:
        super().__init__()
        self._device, self._fakes, self._tracker = device, fakes, tracker
        self._preparing = fakes is None
        self._answers: Any = WeakIdKeyDictionary()  # of fake results of tests: what they would be

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """What runs inside the block prepares data: it is real, also where the program's device is the CPU."""
        before, self._preparing = self._preparing, True
        try:
            yield
        finally:
            self._preparing = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its parts come back here
        kwargs = {} if kwargs is None else kwargs
        given = tree_flatten((args, kwargs))[0]
        tensors = [x for x in given if isinstance(x, Tensor)]
        fake = [x for x in tensors if isinstance(x, FakeTensor)]
        if self._fakes is not None and not fake and self._on_host(tensors, given, kwargs):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if fake and func is _aten._pin_memory.default:
            func = _aten.clone.default  # a copy on the host, which fake tensors cannot pin
            args, kwargs = args[:1], {}
        if fake and func in _NUMBERS:
            return self._answer(func, fake[0])
        if func.namespace == "longtrain":
            return self._opened(func, args, kwargs)  # host data stays real inside
        if self._fakes is not None and len(fake) < len(tensors):
            args, kwargs = cast(Any, tree_map_only(Tensor, self._faked, (args, kwargs)))
        result = func(*args, **kwargs)
        if fake and func.overloadpacket in _TESTS:
            self._answers[result] = _TESTS[func.overloadpacket]
        return result

    def _on_host(self, tensors: Sequence[Tensor], given: Sequence[Any], options: Mapping[str, Any]) -> bool:
        """Whether to really do this: on real tensors of the host, or making one there that is not for offloading.

        What is offloaded is pinned, or floating point; of those that are made from nothing, no others are for the host.
        """
        if options.get("pin_memory") or any(isinstance(x, torch.device) and x.type != "cpu" for x in given):
            return False
        if tensors:
            return all(x.device.type == "cpu" for x in tensors)
        floating = isinstance(dtype := options.get("dtype"), torch.dtype) and dtype.is_floating_point
        return self._preparing or (self._device.type != "cpu" and not floating)

    def _faked(self, x: Tensor) -> Tensor:
        assert self._fakes is not None
        return x if isinstance(x, FakeTensor) else self._fakes.from_tensor(x, static_shapes=True)

    def _answer(self, func: Any, x: Tensor) -> Any:
        """What a fake tensor holds where the program asks: its tests find nothing wrong, and its numbers are 1."""
        if func in _COMPARISONS:
            return True
        if func is _aten.is_nonzero.default or x.dtype == torch.bool:
            return self._answers.get(x, True)
        return 1.0 if x.dtype.is_floating_point else 1

    def _opened(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the Python body of a registered operator of ours under all the modes."""
        name = func._schema.name
        term = next(term for start, term in _OPENED.items() if name.startswith(start))
        with self._tracker.making(term), self:
            results = OPDEFS[name]._init_fn(*args, **kwargs)
        if self._tracker.idle:
            kept = name.startswith(_KEPT) and not name.endswith("_backward")
            self._tracker.mark(results, Term.ATTENTION if kept else Term.WORKING)
        return results
