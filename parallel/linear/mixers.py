"""What differs between the linear mixers, and all that does: their passes on one device, and what states pass through.

Every mixer has one state per head, a matrix [rows, columns], and a run of tokens takes it to

    S_out = transition S_in + S_ext,        backward  dS_in = transition^T dS_out + D_ext

with a transition that multiplies the rows: by factors [1] or [rows] (decays), or as a matrix [rows, rows] (delta rule).
So the columns never meet each other, and slot attention's two states, which decay alike, are one: [M, K + V], the
columns of A^T beside those of C. In backward their gradients are known one after the other, in two scans over some of
the columns each: its `parts`. The stages of a pass are those of the kernels' classes.

Letters: N segments of a rank, [B, N, H, rows, columns] their states; the state dtype is float32 (float64 for float64).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.gated_delta_rule import check_inputs as check_delta_rule
from longtrain.kernels.gated_delta_rule import stages as delta_rule_stages
from longtrain.kernels.gated_slot_attention import SlotAttentionBackward, SlotAttentionForward
from longtrain.kernels.gated_slot_attention import check_inputs as check_slot_attention
from longtrain.kernels.linear_attention import check_inputs as check_linear_attention
from longtrain.kernels.linear_attention import stages as linear_attention_stages

Tensors = Sequence[Any]
"""Tensors in the order of a mixer's `arguments`; None for an optional one that is not given."""


@dataclass(frozen=True)
class Sizes:
    """The state of a call: [B, H, rows, columns] in `dtype`; its transition [B, H, *transition]."""

    batch: int
    heads: int
    rows: int
    columns: int
    transition: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[slice, ...]  # columns, in the order of backward's scans

    @property
    def state(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.rows, self.columns


def carry(transition: Tensor, state: Tensor, *, backward: bool = False) -> Tensor:
    """A state [B, H, rows, columns], or in backward its gradient, through a transition [B, H, *transition]."""
    if transition.ndim < state.ndim:  # factors are their own transpose
        return transition.unsqueeze(-1) * state
    return torch.matmul(transition.transpose(-1, -2) if backward else transition, state)


class ForwardPass(Protocol):
    """A rank's own tokens in forward: `summaries` and `local` where wanted, then `finish`."""

    def summaries(self) -> tuple[Tensor, Tensor]:
        """Of each segment the transition [B, N, H, *transition] and S_ext [B, N, H, rows, columns]."""
        ...

    def local(self) -> None:
        """Compute what needs no state, as much as is worth keeping: messages travel meanwhile."""
        ...

    def finish(self, entering: Tensor | None, *, return_state: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """out [B, T_w, H, V], the states after each segment (or None), and what backward wants to have (or None)."""
        ...


class BackwardPass(Protocol):
    """A rank's own tokens in backward: for each part of the columns `summaries` and `local` where wanted, `finish`."""

    def summaries(self) -> Tensor:
        """D_ext of each segment, [B, N, H, rows, columns of the part]."""
        ...

    def local(self, entering: Tensor | None) -> None:
        """As in forward, what needs no gradient of a state; from the states before each segment, as in `finish`."""
        ...

    def finish(self, entering: Tensor | None, leaving: Tensor | None, *, need_state: bool) -> Tensor | None:
        """From the states before each segment and the gradients of those after: the gradients of those before."""
        ...

    def gradients(self) -> Tensors:
        """The gradients of the tensors, each like its tensor, after the last part; None for what is not needed."""
        ...


@dataclass(frozen=True)
class Given:
    """What a backward pass is given besides tensors. saved: what forward's `finish` returned for it."""

    saved: Tensor
    scale: float
    backend: str
    need_decay: bool


class Mixer(ABC):
    """One linear mixer; its public function is `sequence_parallel_` and `name`, its kernels' operator `kernel`."""

    name: str
    kernel: str
    arguments: tuple[str, ...]
    optional: tuple[str, ...] = ("log_decay",)

    @abstractmethod
    def check(self, tensors: Tensors) -> None:
        """Refuse, with a ValueError, shapes, dtypes and devices that the mixer cannot take."""

    @abstractmethod
    def sizes(self, tensors: Tensors) -> Sizes: ...

    @abstractmethod
    def forward(self, tensors: Tensors, offsets: np.ndarray, *, scale: float, backend: str) -> ForwardPass: ...

    @abstractmethod
    def backward(self, tensors: Tensors, offsets: np.ndarray, dout: Tensor, given: Given) -> BackwardPass: ...

    def saved_shape(self, tensors: Tensors) -> tuple[int, ...]:
        """The shape of what forward hands to backward, in the state dtype; (0,) where that is nothing."""
        return (0,)

    def chosen(self, backend: str, tensors: Tensors) -> str:
        """The backend that runs the call."""
        q, v = tensors[0], tensors[2]
        widths = {"K": q.shape[3], "V": v.shape[3]}
        if "slot" in self.arguments:
            widths["M"] = tensors[3].shape[3]
        return choose_backend(self.kernel, backend, device=q.device, dtype=self.sizes(tensors).dtype, widths=widths)


class _LinearAttention(Mixer):
    name, kernel = "linear_attention", "linear_attention"
    arguments = ("q", "k", "v", "log_decay")

    def check(self, tensors: Tensors) -> None:
        check_linear_attention(*tensors)

    def sizes(self, tensors: Tensors) -> Sizes:
        q, k, v, log_decay = tensors
        width = q.shape[3] if log_decay is not None and log_decay.ndim == 4 else 1
        return _sizes(v, (q.shape[3], v.shape[3]), transition=(width,), wide=(q, k, v))

    def forward(self, tensors: Tensors, offsets: np.ndarray, *, scale: float, backend: str) -> ForwardPass:
        q, k, v, log_decay = tensors
        run = linear_attention_stages(backend).forward(q, k, v, log_decay, offsets, scale=scale)
        return _OneStateForward(run, decays=True)

    def backward(self, tensors: Tensors, offsets: np.ndarray, dout: Tensor, given: Given) -> BackwardPass:
        q, k, v, log_decay = tensors
        run = linear_attention_stages(given.backend).backward(q, k, v, log_decay, offsets, dout, scale=given.scale)
        local = partial(run.local, need_decay_gradient=given.need_decay)
        return _OneStateBackward(run, need_decay=given.need_decay, local=local)


class _DeltaRule(Mixer):
    name, kernel = "delta_rule", "gated_delta_rule"
    arguments = ("q", "k", "v", "beta", "log_decay")

    def check(self, tensors: Tensors) -> None:
        check_delta_rule(*tensors)

    def sizes(self, tensors: Tensors) -> Sizes:
        q, k, v = tensors[:3]
        return _sizes(v, (q.shape[3], v.shape[3]), transition=(q.shape[3],) * 2, wide=(q, k, v))

    def forward(self, tensors: Tensors, offsets: np.ndarray, *, scale: float, backend: str) -> ForwardPass:
        run, _ = delta_rule_stages(backend)
        return _OneStateForward(run(*tensors, offsets, scale=scale), decays=False)

    def backward(self, tensors: Tensors, offsets: np.ndarray, dout: Tensor, given: Given) -> BackwardPass:
        _, backward = delta_rule_stages(given.backend)
        run = backward(*tensors, offsets, dout, scale=given.scale)
        return _OneStateBackward(run, need_decay=given.need_decay, local=run.local)


class _SlotAttention(Mixer):
    name, kernel = "slot_attention", "gated_slot_attention"
    arguments, optional = ("q", "k", "v", "slot", "log_decay"), ()

    def check(self, tensors: Tensors) -> None:
        check_slot_attention(*tensors)

    def sizes(self, tensors: Tensors) -> Sizes:
        q, k, v, slot, _ = tensors
        keys, values, slots = q.shape[3], v.shape[3], slot.shape[3]
        parts = slice(keys, keys + values), slice(0, keys)  # the values' gradient is known before the keys'
        return _sizes(v, (slots, keys + values), transition=(slots,), wide=(q, k, v, slot), parts=parts)

    def saved_shape(self, tensors: Tensors) -> tuple[int, ...]:
        return tuple(tensors[3].shape)

    def forward(self, tensors: Tensors, offsets: np.ndarray, *, scale: float, backend: str) -> ForwardPass:
        q, k, v, slot, log_decay = tensors
        run = SlotAttentionForward(q, k, v, slot, log_decay, offsets, scale=scale, backend=backend)
        return _SlotForward(run, key_width=q.shape[3])

    def backward(self, tensors: Tensors, offsets: np.ndarray, dout: Tensor, given: Given) -> BackwardPass:
        q, k, v, slot, log_decay = tensors
        run = SlotAttentionBackward(
            q, k, v, slot, log_decay, given.saved, offsets, dout, scale=given.scale, backend=given.backend
        )
        return _SlotBackward(run, key_width=q.shape[3])


class _OneStateForward:
    """Linear attention and the delta rule: their passes have these stages already."""

    def __init__(self, run: Any, *, decays: bool) -> None:
        self._run, self._decays = run, decays

    def summaries(self) -> tuple[Tensor, Tensor]:
        transition, state = self._run.summaries()
        return transition.exp() if self._decays else transition, state

    def local(self) -> None:
        self._run.local()

    def finish(self, entering: Tensor | None, *, return_state: bool) -> tuple[Tensor, Tensor | None, None]:
        return *self._run.finish(entering, return_state=return_state), None


class _OneStateBackward:
    def __init__(self, run: Any, *, need_decay: bool, local: Callable[[Tensor | None], None]) -> None:
        self._run, self._need_decay, self._local = run, need_decay, local
        self._gradients: Tensors = ()

    def summaries(self) -> Tensor:
        return self._run.summaries()

    def local(self, entering: Tensor | None) -> None:
        self._local(entering)

    def finish(self, entering: Tensor | None, leaving: Tensor | None, *, need_state: bool) -> Tensor | None:
        *self._gradients, dinitial = self._run.finish(
            entering, leaving, need_decay_gradient=self._need_decay, need_state_gradient=need_state
        )
        return dinitial

    def gradients(self) -> Tensors:
        return self._gradients


class _SlotForward:
    """Slot attention's two states as one, see above."""

    def __init__(self, run: SlotAttentionForward, *, key_width: int) -> None:
        self._run, self._key_width = run, key_width

    def summaries(self) -> tuple[Tensor, Tensor]:
        log_transition, keys, values = self._run.summaries()
        return log_transition.exp(), join_states(keys, values)

    def local(self) -> None:
        self._run.local()

    def finish(self, entering: Tensor | None, *, return_state: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        given = None if entering is None else split_states(entering, self._key_width)
        out, weights, states = self._run.finish(given, return_state=return_state)
        return out, None if states is None else join_states(*states), weights


class _SlotBackward:
    """The part of C first, then that of A."""

    def __init__(self, run: SlotAttentionBackward, *, key_width: int) -> None:
        self._run, self._key_width, self._values_done = run, key_width, False
        self._gradients: Tensors = ()

    def summaries(self) -> Tensor:
        return turned(self._run.key_summaries()) if self._values_done else self._run.value_summaries()

    def local(self, entering: Tensor | None) -> None:
        keys, values = (None, None) if entering is None else split_states(entering, self._key_width)
        if self._values_done:
            self._run.local_keys(keys)
        else:
            self._run.local_values(values)

    def finish(self, entering: Tensor | None, leaving: Tensor | None, *, need_state: bool) -> Tensor | None:
        keys, values = (None, None) if entering is None else split_states(entering, self._key_width)
        if not self._values_done:
            self._values_done = True
            return self._run.finish_values(values, leaving)
        *self._gradients, dkeys = self._run.finish(keys, None if leaving is None else turned(leaving))
        return turned(dkeys)

    def gradients(self) -> Tensors:
        return self._gradients


def turned(keys: Tensor) -> Tensor:
    """A [..., K, M] as [..., M, K], and back."""
    return keys.transpose(-1, -2)


def join_states(keys: Tensor, values: Tensor) -> Tensor:
    """Slot attention's states A [..., K, M] and C [..., M, V] as one, [..., M, K + V]."""
    return torch.cat((turned(keys), values), -1)


def split_states(state: Tensor, key_width: int) -> tuple[Tensor, Tensor]:
    """The reverse of `join_states`."""
    return turned(state[..., :key_width]), state[..., key_width:]


def _sizes(
    v: Tensor,
    widths: tuple[int, int],
    *,
    transition: tuple[int, ...],
    wide: Sequence[Tensor],
    parts: tuple[slice, ...] | None = None,
) -> Sizes:
    """wide: the tensors one of which being float64 makes all of it float64."""
    rows, columns = widths
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in wide) else torch.float32
    return Sizes(v.shape[0], v.shape[2], rows, columns, transition, dtype, parts or (slice(0, columns),))


MIXERS: tuple[Mixer, ...] = (_LinearAttention(), _DeltaRule(), _SlotAttention())
LINEAR_ATTENTION, DELTA_RULE, SLOT_ATTENTION = MIXERS
