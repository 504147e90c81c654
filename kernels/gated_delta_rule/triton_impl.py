"""The gated delta rule on Triton: what is allocated and which kernels run, in the stages of `torch_impl.py`.

Forward: pairs, invert, apply, states, outputs. Backward repeats all but the last, then: dvalues, dstates,
pair_gradients and input_gradients (channel_gradients for decays per channel). Matrix products take the dtype of q, k
and v where these are alike, otherwise float32; sums, states that leave the kernels, decays and transitions are float32.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.gated_delta_rule import triton_gradients, triton_states
from longtrain.kernels.gated_delta_rule.triton_call import Call, Prepared


class DeltaRuleForward:
    """As `torch_impl.DeltaRuleForward`, with states in float32."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        offsets: np.ndarray,
        *,
        scale: float,
    ) -> None:
        self._call = Call(q, k, v, beta, log_decay, offsets, scale=scale)
        self._shape, self._dtype = v.shape, q.dtype
        self._ready: Prepared | None = None

    def summaries(self) -> tuple[Tensor, Tensor]:
        """As `torch_impl.DeltaRuleForward.summaries`: transition [B, N, H, K, K] and state [B, N, H, K, V]."""
        call = self._call
        self._ready = call.prepare()
        transition = call.empty_states(of=call.segment_count, values=call.key_width)
        call.carry(self._ready, None, final=transition, transition=True)
        state = call.empty_states(of=call.segment_count)
        call.carry(self._ready, None, final=state)
        return call.by_row(transition), call.by_row(state)

    def local(self) -> None:
        """Nothing: the sums need all that comes before the states, and the outputs need these."""

    def finish(self, initial_state: Tensor | None, *, return_state: bool = True) -> tuple[Tensor, Tensor | None]:
        """As `torch_impl.DeltaRuleForward.finish`."""
        call = self._call
        ready = call.prepare() if self._ready is None else self._ready
        self._ready = None
        states = call.empty_states(of=call.chunk_count, dtype=call.dtype)
        final = call.empty_states(of=call.segment_count) if return_state else None
        call.carry(ready, call.by_segment(initial_state), states=states, final=final)
        out = call.empty(*self._shape, dtype=self._dtype)
        call.launch(
            "outputs",
            triton_states.outputs_kernel,
            (call.chunk_count, call.heads, -1),
            ready.readers,
            ready.p,
            ready.from_start,
            call.chunks,
            states,
            ready.u,
            out,
            call.scale,
        )
        return out, None if final is None else call.by_row(final)


class DeltaRuleBackward:
    """As `torch_impl.DeltaRuleBackward`, with states in float32."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        offsets: np.ndarray,
        dout: Tensor,
        *,
        scale: float,
    ) -> None:
        self._call = Call(q, k, v, beta, log_decay, offsets, scale=scale)
        self._inputs = q, k, v, beta, log_decay
        self._dout = dout.to(self._call.dtype).contiguous()
        self._ready: tuple[Prepared, Tensor] | None = None
        self._states: Tensor | None = None

    def summaries(self) -> Tensor:
        """As `torch_impl.DeltaRuleBackward.summaries`: [B, N, H, K, V]."""
        self._ready = self._prepare()
        dinitial = self._call.empty_states(of=self._call.segment_count)
        self._carry(*self._ready, None, dstates=None, dinitial=dinitial)
        return self._call.by_row(dinitial)

    def local(self, initial_state: Tensor | None) -> None:
        """As `torch_impl.DeltaRuleBackward.local`."""
        call = self._call
        self._ready = self._prepare() if self._ready is None else self._ready
        self._states = call.empty_states(of=call.chunk_count, dtype=call.dtype)
        call.carry(self._ready[0], call.by_segment(initial_state), states=self._states)

    def finish(
        self,
        initial_state: Tensor | None,
        dfinal_state: Tensor | None,
        *,
        need_decay_gradient: bool,
        need_state_gradient: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """As `torch_impl.DeltaRuleBackward.finish`."""
        call = self._call
        if self._states is None:
            self.local(initial_state)
        assert self._states is not None and self._ready is not None
        states, (ready, du) = self._states, self._ready
        self._ready = self._states = None
        dstates = torch.empty_like(states)
        dinitial = call.empty_states(of=call.segment_count) if need_state_gradient else None
        self._carry(ready, du, call.by_segment(dfinal_state), dstates=dstates, dinitial=dinitial)
        pairs = self._pair_gradients(ready, du, need_decay_gradient=need_decay_gradient)
        dq, dk, dlog = self._input_gradients(ready, du, states, dstates, pairs)
        dlog_decay = pairs.dlog.sum(0) if pairs.dlog is not None else dlog if need_decay_gradient else None
        gradients = dq, dk, pairs.dv, pairs.dbeta.sum(0)
        results = [_like(gradient, x) for gradient, x in zip(gradients, self._inputs[:4], strict=True)]
        log_decay = self._inputs[4]
        dlog_decay = None if dlog_decay is None or log_decay is None else _like(dlog_decay, log_decay)
        dq, dk, dv, dbeta = results
        dinitial = None if dinitial is None else self._call.by_row(dinitial)
        return dq, dk, dv, dbeta, dlog_decay, dinitial

    def _prepare(self) -> tuple[Prepared, Tensor]:
        """What forward prepares, and scale P^T dO."""
        call = self._call
        ready = call.prepare()
        du = call.empty(call.rows, call.heads, call.value_width)
        grid = (call.chunk_count, call.heads, -1)
        call.launch("dvalues", triton_states.dvalues_kernel, grid, ready.p, call.chunks, self._dout, du, call.scale)
        return ready, du

    def _carry(
        self, ready: Prepared, du: Tensor, dfinal: Tensor | None, *, dstates: Tensor | None, dinitial: Tensor | None
    ) -> None:
        """Run the kernel dstates, which writes `dstates` (and turns scale P^T dO into dU for them) and `dinitial`."""
        call = self._call
        call.launch(
            "dstates",
            triton_states.dstates_kernel,
            (call.segment_count * call.heads, -1),
            ready.readers,
            ready.written,
            ready.w,
            ready.from_start,
            ready.to_end,
            ready.through,
            call.segments,
            dfinal,
            self._dout,
            du,
            dstates,
            dinitial,
            call.scale,
        )

    def _pair_gradients(self, ready: Prepared, du: Tensor, *, need_decay_gradient: bool) -> "_PairGradients":
        """Run the kernel pair_gradients, which turns dU into R."""
        call = self._call
        rows, heads = call.rows, call.heads
        block = int(call.config(self._last_kernel).constants["BK"])
        parts = 1 + -(-call.key_width // block)
        per_head = call.gate == 1 and need_decay_gradient
        found = _PairGradients(
            dv=call.empty(rows, heads, call.value_width, dtype=self._inputs[2].dtype),
            da=call.empty(rows, heads, call.size),
            dp=call.empty(rows, heads, call.size),
            dbeta=call.empty(parts, rows, heads, dtype=torch.float32),
            dlog=call.empty(parts, rows, heads, dtype=torch.float32) if per_head else None,
        )
        call.launch(
            "pair_gradients",
            triton_gradients.pair_gradients_kernel,
            (call.chunk_count, heads),
            call.v,
            ready.rates,
            call.log_decay,
            call.chunks,
            ready.inverse,
            ready.a,
            ready.p,
            ready.u,
            self._dout,
            du,
            found.dv,
            found.da,
            found.dp,
            found.dbeta,
            found.dlog,
            call.scale,
        )
        return found

    def launch_last_kernel(self) -> None:
        """Run the last kernel of the pass on tensors that nothing has written, to see what it is compiled to."""
        call = self._call
        rows, heads, size = call.rows, call.heads, call.size
        narrow, wide = call.empty(rows, heads, size), call.empty(rows, heads, call.value_width)
        empty = call.empty(1, rows, heads, dtype=torch.float32)
        ready = Prepared(empty[0], narrow, narrow, narrow, narrow, wide, call.q, call.k, empty, empty, empty)
        states = call.empty_states(of=call.chunk_count, dtype=call.dtype)
        pairs = _PairGradients(wide, narrow, narrow, empty, empty if call.gate == 1 else None)
        self._input_gradients(ready, wide, states, states, pairs)

    @property
    def _last_kernel(self) -> str:
        return "channel_gradients" if self._call.gate == 2 else "input_gradients"

    def _input_gradients(
        self, ready: Prepared, r: Tensor, states: Tensor, dstates: Tensor, pairs: "_PairGradients"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the kernel input_gradients or channel_gradients: those of q and k for each head, and of decays per
        channel; parts of those of beta and of decays per head go to `pairs`."""
        call = self._call
        rows, heads, width = call.rows, call.heads, call.key_width
        shared = call.q.shape[2] != heads or call.k.shape[2] != heads
        dtypes = (torch.float32,) * 2 if shared else (x.dtype for x in self._inputs[:2])
        dq, dk = (call.empty(rows, heads, width, dtype=dtype) for dtype in dtypes)
        if call.gate == 2:
            kernel, factors = triton_gradients.channel_gradients_kernel, (call.log_decay, call.chunks)
            dlog = call.empty(rows, heads, width, dtype=torch.float32)
        else:
            kernel = triton_gradients.input_gradients_kernel
            factors = ready.from_start, ready.to_end, ready.through, call.chunks
            dlog = None
        call.launch(
            self._last_kernel,
            kernel,
            (call.chunk_count, heads, -2),
            call.q,
            call.k,
            ready.rates,
            *factors,
            states,
            dstates,
            self._dout,
            r,
            ready.u,
            pairs.da,
            pairs.dp,
            dq,
            dk,
            pairs.dbeta,
            pairs.dlog if dlog is None else dlog,
            rows * heads,
            call.scale,
        )
        return dq, dk, dlog


@dataclass(frozen=True)
class _PairGradients:
    """What the kernel pair_gradients writes; dbeta and dlog [1 + blocks of K, rows, H] are sums over the first."""

    dv: Tensor
    da: Tensor
    dp: Tensor
    dbeta: Tensor
    dlog: Tensor | None


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """A gradient [rows, H, ...] in the shape and dtype of x [B, T, G, ...]: heads that share one of x's are summed."""
    gradient = gradient.view(*x.shape[:2], *gradient.shape[1:])
    if gradient.shape[2] != x.shape[2]:
        gradient = gradient.unflatten(2, (x.shape[2], -1)).sum(3)
    return gradient.to(x.dtype)
