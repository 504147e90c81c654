"""Linear attention on the Triton kernels: the passes of `torch_impl.py`, in the same stages.

Forward walks the tokens once with the state in registers. Where one row's heads are too few programs to fill the
card, each segment is cut into parts (`plan.py`) and scanned like the ranks of a group: a first sweep over k and v sums
up all parts of a segment but its last, a tiny scan gives every part the state that enters it, and then come the
outputs. Bytes, with u = T H K of one 2-byte tensor (1.07 GB at T 131,072, H 32, K = V = 128), P parts a segment:

    forward    q, k, v, out                            4 u      and for the states k, v again      2 u (P-1)/P
    backward   do, k, v, dq;  q, k, v, do, dk, dv     10 u      and for both kinds of states       4 u (P-1)/P

No state per chunk is ever written: only those between parts. These bytes are what memory must move at least: programs
for blocks of columns of one part and head read the same tokens, have neighbouring numbers and so run at about the same
time, and are counted as if the second cache (L2) gave all but the first of them what it read. Nothing enforces that,
and how often it comes true was never measured; without it, with two blocks of columns (K = V = 128), it is 6 u and
18 u. Decays that are trained cost no further read: what their gradients need falls out of the sweeps for dq and dk,
8 bytes a token and block of columns. Decays per channel read and write q and k with their decays and the scores within
chunks besides (`triton_channels.py`).

NaN and inf: documents, rows and heads are never mixed, and inside a document they reach whoever depends on them and
nobody else. Two exceptions, both of gradients of log-decays: a token's own k and v may reach its own, and where bad k
or v stand behind bad q or output gradients in one part, the tokens between may be reached too.
Dots take bfloat16 operands as they are; float16 ones as TF32, since states and scores outgrow float16's range; float32
ones in full.
"""

from functools import cached_property

import numpy as np
from torch import Tensor

from longtrain.kernels.linear_attention.triton_gradients import Read, channel_gradients, read, scalar_gradients
from longtrain.kernels.linear_attention.triton_pass import CHANNEL, HEAD, Pass


class Summaries:
    """The stage that both passes begin with."""

    def __init__(self, shared: Pass, *, forward: bool) -> None:
        self._pass, self._forward = shared, forward
        self.parts: tuple[Tensor, Tensor | None] | None = None

    @cached_property
    def of_segments(self) -> tuple[Tensor, Tensor]:
        """Log transitions [B, N, H, 1 or K] and states from zeros [B, N, H, K, V]."""
        this = self._pass
        self.parts = added, logs = this.summed_parts(forward=self._forward, whole=True)
        shape = (this.batch, this.plan.segments, *added.shape[2:])
        if not this.plan.split:
            return this.log_transition() if logs is None or this.form == HEAD else logs, added
        states = added.new_empty(shape)
        sums = this.log_transition() if logs is None or this.form == HEAD else None
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
        self._pass = Pass(q, k, v, log_decay, offsets, scale=scale)
        self._summaries = Summaries(self._pass, forward=True)

    def summaries(self) -> tuple[Tensor, Tensor]:
        """log_transition [B, N, H, 1 or K] and state [B, N, H, K, V]: S_out = exp(log_transition) S_in + state."""
        return self._summaries.of_segments

    def local(self) -> None:
        """Compute what needs no initial state. All else happens in one sweep with the state, which costs less."""
        if self._pass.form == CHANNEL:
            _ = self._pass.prepared

    def finish(self, initial_state: Tensor | None, *, return_state: bool = True) -> tuple[Tensor, Tensor | None]:
        """The outputs [B, T, H, V], in q's dtype, and the states after each segment, as in `torch_impl`."""
        this = self._pass
        entering = this.entering(initial_state, self._summaries.parts, forward=True)
        leaving = this.empty_part_states() if return_state else None
        out = this.empty(this.value_width, dtype=this.q.tensor.dtype)
        q, k, scores = this.q, this.k, None
        if this.form == CHANNEL:
            readers, written, scores, _ = this.prepared
            q, k = this.as_rows(readers), this.as_rows(written)
        way = {"forward": True, "transposed": False, "entering": entering, "leaving": leaving}
        this.sweep(q, k, this.v, out, **way, scores=scores, plain=(this.q, this.k))
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
        self._pass = Pass(q, k, v, log_decay, offsets, scale=scale, dout=dout, short_parts=short)
        self._summaries = Summaries(self._pass, forward=False)
        self._read: Read | None = None

    def summaries(self) -> Tensor:
        """The gradient of each segment's initial state from its own outputs, [B, N, H, K, V]."""
        return self._summaries.of_segments[1]

    def log_transition(self) -> Tensor:
        """As the forward pass's, [B, N, H, 1 or K]."""
        return self._summaries.of_segments[0]

    def local(self, initial_state: Tensor | None, *, need_decay_gradient: bool) -> None:
        """Run the sweep that needs no gradient of a state, which is that for dq."""
        states = self._pass.entering(initial_state, None, forward=True)
        self._read = read(self._pass, states, need_decay_gradient=need_decay_gradient)

    def finish(
        self,
        initial_state: Tensor | None,
        dfinal_state: Tensor | None,
        *,
        need_decay_gradient: bool,
        need_state_gradient: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The gradients of q, k, v, log_decay and initial_state, as in `torch_impl`."""
        this = self._pass
        if self._read is None:
            self.local(initial_state, need_decay_gradient=need_decay_gradient)
        assert self._read is not None
        dstates = this.entering(dfinal_state, self._summaries.parts, forward=False)
        dentering = this.empty_part_states() if need_state_gradient or need_decay_gradient else None
        gradients = channel_gradients if this.form == CHANNEL else scalar_gradients
        dq, dk, dv, dlog = gradients(this, self._read, dstates, dentering, need_decay_gradient=need_decay_gradient)
        dinitial = None
        if need_state_gradient and dentering is not None:
            dinitial = this.of_segments(dentering, last=False)
        return dq, dk, dv, dlog, dinitial
