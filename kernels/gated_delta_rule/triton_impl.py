"""The gated delta rule on Triton: what is allocated and which kernels run, in the stages of `torch_impl.py`.

Forward: pairs, invert, apply, states, outputs. Backward repeats all but the last, then: dvalues, dstates,
pair_gradients and input_gradients (channel_gradients for decays per channel). Matrix products take the dtype of q, k
and v where these are alike, otherwise float32; sums, states that leave the kernels, decays and transitions are float32.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.gated_delta_rule import configs, triton_gradients, triton_prepare, triton_states
from longtrain.kernels.launching import Config, launch

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Prepared:
    """What chunks are before any state is known; names as in `triton_prepare.py`."""

    p: Tensor
    inverse: Tensor
    a: Tensor
    w: Tensor
    u: Tensor
    readers: Tensor  # Q exp(prefix) and K exp(suffix), or q and k themselves
    written: Tensor
    from_start: Tensor | None
    to_end: Tensor | None
    through: Tensor | None


class _Call:
    """The tensors of a pass as the kernels take them, the tables of chunks and segments, and launches."""

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
        alike = q.dtype == k.dtype == v.dtype and q.dtype in _HALVES
        self.dtype = q.dtype if alike else torch.float32
        self.q, self.k, self.v = (x.to(self.dtype).contiguous() for x in (q, k, v))
        self.beta = beta.float().contiguous()
        self.log_decay = None if log_decay is None else log_decay.float().contiguous()
        self.gate = 0 if log_decay is None else log_decay.ndim - 2
        self.scale = scale
        batch, tokens, self.heads, self.value_width = v.shape
        self._grid = batch, len(offsets) - 1
        self.key_width = k.shape[3]
        self.rows = batch * tokens
        widths = {"key_width": self.key_width, "value_width": self.value_width}
        self.size = configs.chunk_size(q.device, self.dtype, **widths)
        chunks, segments = _tables(offsets, batch=batch, tokens=tokens, size=self.size)
        self.chunk_count, self.segment_count = len(chunks), len(segments)
        self.chunks, self.segments = (torch.from_numpy(x).to(q.device) for x in (chunks, segments))

    @cached_property
    def _common(self) -> dict[str, Any]:
        return {
            "H": self.heads,
            "GQ": self.q.shape[2],
            "GK": self.k.shape[2],
            "K": self.key_width,
            "V": self.value_width,
            "C": self.size,
            "LEVELS": self.size.bit_length() - 1,
            "GATE": self.gate,
            "PRECISION": "ieee",
        }

    def launch(self, name: str, kernel: Any, grid: tuple[int, ...], *args: Any, values: int | None = None) -> None:
        """Run `kernel`, whose configuration goes by `name`; grid: -1 stands for blocks of V, -2 for blocks of K.

        values: takes the place of V.
        """
        constants = {key: x for key, x in self._common.items() if key in kernel.arg_names}
        width = self.value_width if values is None else values
        if "V" in constants:
            constants["V"] = width
        if self.gate == 2 and name in ("states", "outputs", "dstates"):  # q and k come with decays, for each head
            constants |= {key: self.heads for key in ("GQ", "GK") if key in constants}
        if name == "states":
            constants["IDENTITY"] = values is not None
        config = self.config(name, width)
        blocks = {-1: ("BV", width), -2: ("BK", self.key_width)}
        sizes = (-(-blocks[x][1] // int(config.constants[blocks[x][0]])) if x < 0 else x for x in grid)
        launch(kernel, tuple(sizes), *args, config=config, **constants)

    def config(self, name: str, values: int | None = None) -> Config:
        """The configuration of a kernel."""
        width = self.value_width if values is None else values
        return configs.config(name, self.q.device, self.dtype, key_width=self.key_width, value_width=width)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In the dtype of products unless said otherwise."""
        return self.v.new_empty(shape, dtype=dtype or self.dtype)

    def empty_states(self, *, of: int, dtype: torch.dtype = torch.float32, values: int | None = None) -> Tensor:
        """[of, H, K, V]."""
        return self.empty(of, self.heads, self.key_width, self.value_width if values is None else values, dtype=dtype)

    def prepare(self) -> _Prepared:
        """Run the kernels pairs, invert and apply."""
        size, heads, width = self.size, self.heads, self.key_width
        p, inverse = (self.empty(self.rows, heads, size) for _ in range(2))
        a = self.empty(self.rows, heads, size, dtype=torch.float32)
        w, u = self.empty(self.rows, heads, width), self.empty(self.rows, heads, self.value_width)
        per_channel, per_head = self.gate == 2, self.gate == 1
        readers, written = (self.empty(self.rows, heads, width) if per_channel else None for _ in range(2))
        from_start, to_end = (self.empty(self.rows, heads, dtype=torch.float32) if per_head else None for _ in range(2))
        through = None
        if self.gate:
            through = self.empty(self.chunk_count, heads, *((width,) if per_channel else ()), dtype=torch.float32)
        self.launch(
            "pairs_channel" if per_channel else "pairs",
            triton_prepare.pairs_kernel,
            (self.chunk_count, heads),
            self.q,
            self.k,
            self.log_decay,
            self.chunks,
            a,
            p,
            readers,
            w if per_channel else None,
            written,
            from_start,
            to_end,
            through,
        )
        grid = (self.chunk_count, heads)
        self.launch("invert", triton_prepare.invert_kernel, grid, a, self.beta, self.chunks, inverse)
        self.launch(
            "apply",
            triton_prepare.apply_kernel,
            grid,
            None if per_channel else self.k,
            self.v,
            self.beta,
            from_start,
            inverse,
            self.chunks,
            w,
            u,
        )
        readers, written = self.q if readers is None else readers, self.k if written is None else written
        return _Prepared(p, inverse, a, w, u, readers, written, from_start, to_end, through)

    def carry(
        self,
        ready: _Prepared,
        initial: Tensor | None,
        *,
        states: Tensor | None = None,
        final: Tensor | None = None,
        transition: bool = False,
    ) -> None:
        """Run the kernel states, which writes `states` (and turns U0 into U for them) and `final`.

        transition: `final` is [segments, H, K, K], what becomes of the identity where nothing new is stored.
        """
        self.launch(
            "states",
            triton_states.states_kernel,
            (self.segment_count * self.heads, -1),
            ready.written,
            ready.w,
            ready.to_end,
            ready.through,
            self.segments,
            initial,
            None if transition else ready.u,
            states,
            final,
            values=self.key_width if transition else None,
        )

    def by_segment(self, states: Tensor | None) -> Tensor | None:
        """[B, N, H, K, V] as [segments, H, K, V] in float32."""
        return None if states is None else states.float().contiguous().flatten(0, 1)

    def by_row(self, states: Tensor) -> Tensor:
        """[segments, H, K, V] as [B, N, H, K, V]."""
        return states.view(*self._grid, *states.shape[1:])


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
        self._call = _Call(q, k, v, beta, log_decay, offsets, scale=scale)
        self._shape, self._dtype = v.shape, q.dtype
        self._ready: _Prepared | None = None

    def summaries(self) -> tuple[Tensor, Tensor]:
        """As `torch_impl.DeltaRuleForward.summaries`: transition [B, N, H, K, K] and state [B, N, H, K, V]."""
        call = self._call
        self._ready = call.prepare()
        transition = call.empty_states(of=call.segment_count, values=call.key_width)
        call.carry(self._ready, None, final=transition, transition=True)
        state = call.empty_states(of=call.segment_count)
        call.carry(self._ready, None, final=state)
        return call.by_row(transition), call.by_row(state)

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
        self._call = _Call(q, k, v, beta, log_decay, offsets, scale=scale)
        self._inputs = q, k, v, beta, log_decay
        self._dout = dout.to(self._call.dtype).contiguous()
        self._ready: tuple[_Prepared, Tensor] | None = None

    def summaries(self) -> Tensor:
        """As `torch_impl.DeltaRuleBackward.summaries`: [B, N, H, K, V]."""
        self._ready = self._prepare()
        dinitial = self._call.empty_states(of=self._call.segment_count)
        self._carry(*self._ready, None, dstates=None, dinitial=dinitial)
        return self._call.by_row(dinitial)

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
        ready, du = self._prepare() if self._ready is None else self._ready
        self._ready = None
        states, dstates = (call.empty_states(of=call.chunk_count, dtype=call.dtype) for _ in range(2))
        dinitial = call.empty_states(of=call.segment_count) if need_state_gradient else None
        call.carry(ready, call.by_segment(initial_state), states=states)
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

    def _prepare(self) -> tuple[_Prepared, Tensor]:
        """What forward prepares, and scale P^T dO."""
        call = self._call
        ready = call.prepare()
        du = call.empty(call.rows, call.heads, call.value_width)
        grid = (call.chunk_count, call.heads, -1)
        call.launch("dvalues", triton_states.dvalues_kernel, grid, ready.p, call.chunks, self._dout, du, call.scale)
        return ready, du

    def _carry(
        self, ready: _Prepared, du: Tensor, dfinal: Tensor | None, *, dstates: Tensor | None, dinitial: Tensor | None
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

    def _pair_gradients(self, ready: _Prepared, du: Tensor, *, need_decay_gradient: bool) -> "_PairGradients":
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
            call.beta,
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
        ready = _Prepared(narrow, narrow, narrow, narrow, wide, call.q, call.k, empty, empty, empty)
        states = call.empty_states(of=call.chunk_count, dtype=call.dtype)
        pairs = _PairGradients(wide, narrow, narrow, empty, empty if call.gate == 1 else None)
        self._input_gradients(ready, wide, states, states, pairs)

    @property
    def _last_kernel(self) -> str:
        return "channel_gradients" if self._call.gate == 2 else "input_gradients"

    def _input_gradients(
        self, ready: _Prepared, r: Tensor, states: Tensor, dstates: Tensor, pairs: "_PairGradients"
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
            call.beta,
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


def _tables(offsets: np.ndarray, *, batch: int, tokens: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [chunks, 2]: first row and tokens of each chunk; [segments, 3]: first row, tokens and first chunk."""
    lengths = np.tile(np.diff(offsets), batch)
    starts = (np.arange(batch)[:, None] * tokens + offsets[:-1]).reshape(-1)
    counts = -(-lengths // size)
    firsts = np.cumsum(counts) - counts
    number = np.arange(counts.sum()) - np.repeat(firsts, counts)  # of a chunk in its segment
    rows = np.repeat(starts, counts) + number * size
    chunks = np.stack((rows, np.minimum(np.repeat(lengths, counts) - number * size, size)), 1)
    return chunks.astype(np.int32), np.stack((starts, lengths, firsts), 1).astype(np.int32)


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """A gradient [rows, H, ...] in the shape and dtype of x [B, T, G, ...]: heads that share one of x's are summed."""
    gradient = gradient.view(*x.shape[:2], *gradient.shape[1:])
    if gradient.shape[2] != x.shape[2]:
        gradient = gradient.unflatten(2, (x.shape[2], -1)).sum(3)
    return gradient.to(x.dtype)
