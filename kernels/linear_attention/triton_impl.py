"""Linear attention on the Triton kernels: the passes of `torch_impl.py`, in the same stages.

Forward walks the tokens once with the state in registers. Where one row's heads are too few programs to fill the
card, each segment is cut into parts (`plan.py`) and scanned like the ranks of a group: a first sweep over k and v sums
up all parts of a segment but its last, a tiny scan gives every part the state that enters it, and then come the
outputs. Bytes, with u = T H K of one 2-byte tensor (1.07 GB at T 131,072, H 32, K = V = 128), P parts a segment:

    forward    q, k, v, out                            4 u      and for the states k, v again      2 u (P-1)/P
    backward   do, k, v, dq;  q, k, v, do, dk, dv     10 u      and for both kinds of states       4 u (P-1)/P

No state per chunk is ever written: only those between parts. Programs for blocks of columns read the same tokens at the
same time, which counts once (the cache serves the others). Decays that are trained take one more read of q, k, v, do.
Decays per channel read and write q and k with their decays and the scores within chunks besides (`triton_channels.py`).

NaN and inf: documents, rows and heads are never mixed. Inside a document they reach whoever depends on them, and beside
those only tokens of the same chunk (at most 63 before, or in backward behind), whose masked scores make 0 * NaN.
Dots take bfloat16 operands as they are; float16 ones as TF32, since states and scores outgrow float16's range; float32
ones in full.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from longtrain.kernels import launching
from longtrain.kernels.launching import launch
from longtrain.kernels.linear_attention import configs, triton_channels, triton_forward
from longtrain.kernels.linear_attention.plan import Plan, plan

_NONE, _HEAD, _TOKEN, _CHANNEL = range(4)  # forms of decay, as in the kernels


@dataclass(frozen=True)
class _Rows:
    """Tokens [B, T, heads, width] as the kernels read them: any strides with the last dimension contiguous."""

    tensor: Tensor
    heads: int  # H

    @property
    def strides(self) -> tuple[int, int, int]:
        batch, token, head, _ = self.tensor.stride()
        return batch, token, head

    @property
    def share(self) -> int:
        """Heads that share one of this tensor's."""
        return self.heads // self.tensor.shape[2]

    @property
    def width(self) -> int:
        return self.tensor.shape[3]


class _Pass:
    """What both passes are given and do alike."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        offsets: np.ndarray,
        *,
        scale: float,
        dout: Tensor | None = None,
        short_parts: bool = False,
    ) -> None:
        self.batch, self.tokens, self.heads, self.value_width = v.shape
        self.key_width = q.shape[3]
        self.q, self.k, self.v = (self._rows(x) for x in (q, k, v))
        self.do = None if dout is None else self._rows(dout)
        self.scale, self.offsets, self.log_decay = float(scale), offsets, log_decay
        self.form = _NONE if log_decay is None else {1: _HEAD, 3: _TOKEN, 4: _CHANNEL}[log_decay.ndim]
        self.log = None if log_decay is None else log_decay.to(_kernel_dtype(log_decay.dtype)).contiguous()
        dtypes = {x.dtype for x in (q, k, v, dout) if x is not None}
        self.kind = "half" if dtypes == {torch.bfloat16} else "wide"
        self.compute = torch.bfloat16 if self.kind == "half" else torch.float32
        precision = "ieee" if torch.float32 in dtypes or self.kind == "half" else "tf32"
        self.device = v.device
        self.key = (
            launching.architecture(v.device),
            self.kind,
            configs.bucket(self.key_width, self.value_width),
        )
        self.size = configs.chunk_size(*self.key)
        self.block_k, self.block_v = _block(self.key_width), _block(self.value_width)
        self.constants: dict[str, Any] = {
            "DECAY": self.form,
            "TYPE": tl.bfloat16 if self.kind == "half" else tl.float32,
            "PRECISION": precision,
            "C": self.size,
        }
        self.wide = {"WIDE": self.kind == "wide" and precision == "ieee"}
        self.plan = self._plan(short_parts)

    def _rows(self, x: Tensor) -> _Rows:
        return _Rows(x if x.stride(3) == 1 or x.shape[3] == 1 and x.is_contiguous() else x.contiguous(), self.heads)

    def _plan(self, short: bool) -> Plan:
        blocks = _blocks(self.value_width, configs.sweep(*self.key).constants["BO"])
        wanted = -(-configs.PROGRAMS[self.key[0]] // max(1, self.batch * self.heads * blocks))
        part = max(-(-self.tokens // wanted), configs.SHORTEST_PART)
        if short:
            part = min(part, configs.LONGEST_PART_WITH_DECAY_GRADIENT)
        return plan(self.offsets, size=self.size, part_tokens=part, device=self.device)

    @cached_property
    def prepared(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With decays per channel: readers, written [B, T, H, K], scores [B, T, H, C] and totals [B, M, H, K]."""
        readers, written = (self._empty(self.key_width, dtype=self.compute) for _ in range(2))
        scores = self._empty(self.size, dtype=self.compute)
        totals = self.v.tensor.new_empty(
            (self.batch, self.plan.chunks, self.heads, self.key_width), dtype=torch.float32
        )
        config = configs.channels(*self.key)
        launch(
            triton_channels.prepare,
            (self.batch * self.heads * self.plan.chunks,),
            *(self.q.tensor, self.k.tensor, self.log, readers, written, scores, totals, self.plan.chunk_table),
            *(*self.q.strides, *self.k.strides, self.q.share, self.k.share),
            *(self.heads, self.tokens, self.plan.chunks, self.scale),
            config=config,
            BK=min(config.constants["BK"], self.block_k),
            K=self.key_width,
            LEVELS=self.size.bit_length() - 1,
            **{name: self.constants[name] for name in ("TYPE", "PRECISION", "C")},
        )
        return readers, written, scores, totals

    def summed_parts(self, *, forward: bool, whole: bool) -> tuple[Tensor, Tensor | None]:
        """What parts reach from zeros, [B, P, H, K, V], and their log transitions [B, P, H, 1 or K].

        whole: of all parts, not only of those that another one of their segment follows (the others are not written).
        """
        b, c = (self.k, self.v) if forward else (self.q, self.do)
        assert c is not None, "only the backward pass goes in reverse"
        totals, factor = None, 1.0 if forward else self.scale
        if self.form == _CHANNEL:
            readers, written, _, totals = self.prepared
            b, factor = self._rows(written if forward else readers), 1.0
        added, logs = self._part_states(), None
        if self.form != _NONE:
            width = self.key_width if self.form == _CHANNEL else 1
            logs = added.new_empty((*added.shape[:3], width))
        config = configs.part_states(*self.key)
        block_k = min(config.constants["BK"], self.block_k)
        block_v = min(config.constants["BV"], self.block_v)
        listed = self.plan.needed(forward=forward, whole=whole)
        blocks = _blocks(self.key_width, block_k) * _blocks(self.value_width, block_v)
        launch(
            triton_forward.part_states,
            (self.batch * self.heads * len(listed) * blocks,),
            *(b.tensor, c.tensor, self.log, totals, added, logs, self.plan.on_device, listed),
            *(*b.strides, *c.strides, b.share, c.share, self.heads, self.tokens),
            *(self.plan.count, len(listed), self.plan.chunks if self.form == _CHANNEL else 0, factor),
            config=config,
            BK=block_k,
            BV=block_v,
            REVERSE=not forward,
            K=self.key_width,
            V=self.value_width,
            **self.constants,
        )
        return added, logs

    def scan(
        self,
        added: Tensor,
        logs: Tensor | None,
        initial: Tensor | None,
        *,
        forward: bool,
        entering: Tensor | None = None,
        final: Tensor | None = None,
        final_logs: Tensor | None = None,
    ) -> None:
        """`triton_forward.carry`."""
        config = configs.small(*self.key)
        blocks = _blocks(self.key_width, config.constants["BK"])
        blocks *= _blocks(self.value_width, config.constants["BV"])
        launch(
            triton_forward.carry,
            (self.batch * self.heads * self.plan.segments * blocks,),
            *(added, logs, initial, entering, final, final_logs, self.plan.first_on_device),
            *(self.heads, self.plan.segments, self.plan.count),
            config=config,
            REVERSE=not forward,
            DECAY=self.form,
            K=self.key_width,
            V=self.value_width,
        )

    def entering(self, initial: Tensor | None, summed: tuple[Tensor, Tensor | None] | None, *, forward: bool) -> Any:
        """The states that enter the parts, [B, P, H, K, V], from those that enter the segments; None for zeros."""
        initial = None if initial is None else initial.to(torch.float32).contiguous()
        if not self.plan.split:
            return initial
        added, logs = summed or self.summed_parts(forward=forward, whole=False)
        entering = self._part_states()
        self.scan(added, logs, initial, forward=forward, entering=entering)
        return entering

    def sweep(
        self,
        a: _Rows,
        b: _Rows,
        c: _Rows,
        out: Tensor,
        *,
        forward: bool,
        transposed: bool,
        entering: Tensor | None,
        leaving: Tensor | None = None,
        scores: Tensor | None = None,
        other: _Rows | None = None,
    ) -> Tensor | None:
        """`triton_forward.sweep` into `out` [B, T, H, c's width]; transposed: its state is [V, K].

        other: where given, the share of other . out that came through states is returned, [blocks, B, T, H].
        """
        config = configs.sweep(*self.key)
        block = min(config.constants["BO"], _block(c.width))
        blocks = _blocks(c.width, block)
        product = None
        if other is not None:
            product = out.new_empty((blocks, self.batch, self.tokens, self.heads), dtype=torch.float32)
        totals, factor, chunks = None, self.scale, 0
        if self.form == _CHANNEL:
            totals, factor, chunks = self.prepared[3], 1.0, self.plan.chunks
        launch(
            triton_forward.sweep,
            (self.batch * self.heads * self.plan.count * blocks,),
            *(a.tensor, b.tensor, c.tensor, out, scores, self.log, totals, entering, leaving, self.plan.on_device),
            *(product, None if other is None else other.tensor),
            *(*a.strides, *b.strides, *c.strides, *((0, 0, 0) if other is None else other.strides)),
            *(a.share, b.share, c.share, 1 if other is None else other.share),
            *(self.heads, self.batch, self.tokens, self.plan.count, chunks, factor),
            config=config,
            REVERSE=not forward,
            TRANSPOSED=transposed,
            A=a.width,
            OUT=c.width,
            BA=_block(a.width),
            BO=block,
            **self.constants,
            **self.wide,
        )
        return product

    def log_transition(self) -> Tensor:
        """The sum of log_decay over each segment, [B, N, H, 1 or K], where no kernel had to look at the tokens."""
        shape = (self.batch, self.plan.segments, self.heads, 1)
        if self.log_decay is None:
            return self.v.tensor.new_zeros(shape, dtype=torch.float32)
        lengths = torch.from_numpy(np.diff(self.offsets)).to(self.device, torch.float32)[:, None]
        sums = torch.where(lengths > 0, lengths * self.log_decay.to(torch.float32), 0.0)
        return sums[None, ..., None].expand(shape)

    def _empty(self, width: int, *, dtype: torch.dtype) -> Tensor:
        """[B, T, H, width]."""
        return self.v.tensor.new_empty((self.batch, self.tokens, self.heads, width), dtype=dtype)

    def _part_states(self) -> Tensor:
        shape = (self.batch, self.plan.count, self.heads, self.key_width, self.value_width)
        return self.v.tensor.new_empty(shape, dtype=torch.float32)

    def of_segments(self, states: Tensor, *, last: bool) -> Tensor:
        """Of states [B, P, H, K, V] those of each segment's last or first part."""
        return states.index_select(1, self.plan.ends[last]) if self.plan.split else states


class _Summaries:
    """The stage that both passes begin with."""

    def __init__(self, shared: _Pass, *, forward: bool) -> None:
        self._pass, self._forward = shared, forward
        self.parts: tuple[Tensor, Tensor | None] | None = None

    @cached_property
    def of_segments(self) -> tuple[Tensor, Tensor]:
        """Log transitions [B, N, H, 1 or K] and states from zeros [B, N, H, K, V]."""
        this = self._pass
        self.parts = added, logs = this.summed_parts(forward=self._forward, whole=True)
        shape = (this.batch, this.plan.segments, *added.shape[2:])
        if not this.plan.split:
            return this.log_transition() if logs is None or this.form == _HEAD else logs, added
        states = added.new_empty(shape)
        sums = this.log_transition() if logs is None or this.form == _HEAD else None
        final_logs = logs.new_empty((*shape[:3], logs.shape[3])) if sums is None and logs is not None else None
        this.scan(added, logs, None, forward=self._forward, final=states, final_logs=final_logs)
        return final_logs if sums is None and final_logs is not None else this.log_transition(), states


class LinearAttentionForward:
    """The forward pass over segments; arguments, stages and results as of `torch_impl.LinearAttentionForward`.

    K, V at most 256; states are float32.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, offsets: np.ndarray, *, scale: float
    ) -> None:
        self._pass = _Pass(q, k, v, log_decay, offsets, scale=scale)
        self._summaries = _Summaries(self._pass, forward=True)

    def summaries(self) -> tuple[Tensor, Tensor]:
        """log_transition [B, N, H, 1 or K] and state [B, N, H, K, V]: S_out = exp(log_transition) S_in + state."""
        return self._summaries.of_segments

    def local(self) -> None:
        """Compute what needs no initial state. All else happens in one sweep with the state, which costs less."""
        if self._pass.form == _CHANNEL:
            _ = self._pass.prepared

    def finish(self, initial_state: Tensor | None, *, return_state: bool = True) -> tuple[Tensor, Tensor | None]:
        """The outputs [B, T, H, V], in q's dtype, and the states after each segment, as in `torch_impl`."""
        this = self._pass
        entering = this.entering(initial_state, self._summaries.parts, forward=True)
        leaving = this._part_states() if return_state else None
        out = this._empty(this.value_width, dtype=this.q.tensor.dtype)
        q, k, scores = this.q, this.k, None
        if this.form == _CHANNEL:
            readers, written, scores, _ = this.prepared
            q, k = this._rows(readers), this._rows(written)
        this.sweep(q, k, this.v, out, forward=True, transposed=False, entering=entering, leaving=leaving, scores=scores)
        return out, None if leaving is None else this.of_segments(leaving, last=True)


class LinearAttentionBackward:
    """The backward pass; arguments, stages and results as of `torch_impl.LinearAttentionBackward`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        offsets: np.ndarray,
        dout: Tensor,
        *,
        scale: float,
    ) -> None:
        # Where the decays are no input of training, shorter parts would cost bytes; which it is, only finish is told.
        short = log_decay is not None and log_decay.ndim > 1
        self._pass = _Pass(q, k, v, log_decay, offsets, scale=scale, dout=dout, short_parts=short)
        self._summaries = _Summaries(self._pass, forward=False)

    def summaries(self) -> Tensor:
        """The gradient of each segment's initial state from its own outputs, [B, N, H, K, V]."""
        return self._summaries.of_segments[1]

    def log_transition(self) -> Tensor:
        """As the forward pass's, [B, N, H, 1 or K]."""
        return self._summaries.of_segments[0]

    def local(self, *, need_decay_gradient: bool) -> None:
        """Compute what needs no gradient of a state: nothing, as in the forward pass."""
        if self._pass.form == _CHANNEL:
            _ = self._pass.prepared

    def finish(
        self,
        initial_state: Tensor | None,
        dfinal_state: Tensor | None,
        *,
        need_decay_gradient: bool,
        need_state_gradient: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The gradients of q, k, v, log_decay and initial_state, as in `torch_impl`."""
        from longtrain.kernels.linear_attention.triton_gradients import channel_gradients, scalar_gradients

        this = self._pass
        states = this.entering(initial_state, None, forward=True)
        dstates = this.entering(dfinal_state, self._summaries.parts, forward=False)
        dentering = this._part_states() if need_state_gradient or need_decay_gradient else None
        gradients = channel_gradients if this.form == _CHANNEL else scalar_gradients
        dq, dk, dv, dlog = gradients(this, states, dstates, dentering, need_decay_gradient=need_decay_gradient)
        dinitial = None
        if need_state_gradient and dentering is not None:
            dinitial = this.of_segments(dentering, last=False)
        return dq, dk, dv, dlog, dinitial


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


def _block(width: int) -> int:
    """The power of two that holds a width, at least 16, which a matrix product needs."""
    return max(16, 1 << (width - 1).bit_length())


def _blocks(width: int, block: int) -> int:
    """How many blocks it takes."""
    return -(-width // block)
