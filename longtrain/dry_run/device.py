"""A device that holds nothing: torch's slot for a backend of one's own, filled with Python that does nothing.

Tensors on it are fake (shapes, dtypes and storages of a size, no memory), so a model of any size fits; streams and
events are objects that do nothing. It has to be a device of its own: fake "cuda" tensors want a driver, and on "cpu" a
copy to the host would cost nothing. The slot exists once per process, and an error inside a backward pass on it ends
the process: dry runs are processes of their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import backend_registration

NAME = "dry"


class Stream:
    """A queue of work that is always empty."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> "Event":
        return event if event is not None else Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Event:
    """A mark in a queue of work; it has always been reached."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class _Module:
    """What torch.cuda is for "cuda"."""

    Stream = Stream
    Event = Event
    _stream = Stream()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def is_in_bad_fork(self) -> bool:
        return False

    _is_in_bad_fork = is_in_bad_fork

    def manual_seed_all(self, seed: int) -> None: ...

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def current_stream(self, device: Any = None) -> Any:
        return self._stream

    default_stream = current_stream

    def set_stream(self, stream: Any) -> None: ...

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def install() -> torch.device:
    """Make the device known to torch; once per process."""
    setup: Any = backend_registration._setup_privateuseone_for_python_backend
    setup(NAME, backend_module=_Module())
    return torch.device(NAME, 0)
