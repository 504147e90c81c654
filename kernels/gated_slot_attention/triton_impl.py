"""The scores of tokens and slots on the Triton kernels: linear attention's sweep, read out on the side that decays.

All else of gated slot attention is linear attention's own passes (`passes.py`).

NaN and inf reach whoever depends on them and nobody else, as in linear attention's kernels (with the exceptions there).
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.gated_slot_attention import configs, triton_kernels
from longtrain.kernels.launching import launch
from longtrain.kernels.linear_attention.triton_impl import LinearAttentionBackward, LinearAttentionForward, Summaries
from longtrain.kernels.linear_attention.triton_pass import Pass

__all__ = ["LinearAttentionBackward", "LinearAttentionForward", "SlotScores"]


class _SlotPass(Pass):
    """Linear attention with keys `slot` and values k, whose queries nobody knows yet."""

    @cached_property
    def prepared(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """written [B, T, H, M], in place of readers and scores too, and totals [B, chunks, H, M]."""
        assert self.log is not None, "there are always decays per slot"
        written = self.empty(self.key_width, dtype=self.compute)
        totals = written.new_empty((self.batch, self.plan.chunks, self.heads, self.key_width), dtype=torch.float32)
        launch(
            triton_kernels.write_slots,
            (self.batch * self.heads * self.plan.chunks,),
            *(self.k.tensor, self.log, written, totals, self.plan.chunk_table),
            *(*self.k.strides, self.heads, self.tokens, self.plan.chunks),
            config=configs.write_slots(*self.key),
            M=self.key_width,
            C=self.size,
        )
        return written, written, written, totals

    def read_out(self, entering: Tensor | None, leaving: Tensor | None) -> Tensor:
        """The scores [B, T, H, M], float32; entering, leaving [B, P, H, M, K]: the states before and after parts."""
        assert self.do is not None and self.log is not None
        scores = self.empty(self.key_width, dtype=torch.float32)
        written = self.as_rows(self.prepared[1])
        self.sweep(self.do, self.v, written, scores, forward=True, transposed=True, entering=entering, leaving=leaving)
        config = configs.add_within(*self.key)
        launch(
            triton_kernels.add_within,
            (self.batch * self.heads * self.plan.chunks, -(-self.key_width // config.constants["BM"])),
            *(self.do.tensor, self.v.tensor, self.k.tensor, self.log, scores, self.plan.chunk_table),
            *(*self.do.strides, *self.v.strides, *self.k.strides, self.heads, self.tokens, self.plan.chunks),
            self.scale,
            config=config,
            K=self.value_width,
            M=self.key_width,
            LEVELS=self.size.bit_length() - 1,
            **{name: self.constants[name] for name in ("TYPE", "PRECISION", "C")},
        )
        return scores


class SlotScores:
    """The pass that gives the scores; arguments, stages and results as of `torch_impl.SlotScores`. K, M up to 256."""

    def __init__(
        self, q: Tensor, k: Tensor, slot: Tensor, log_decay: Tensor, offsets: np.ndarray, *, scale: float
    ) -> None:
        self._pass = _SlotPass(slot, slot, k, log_decay, offsets, scale=scale, dout=q)
        self._summaries = Summaries(self._pass, forward=True)

    def summaries(self) -> tuple[Tensor, Tensor]:
        """log_transition [B, N, H, M] and state [B, N, H, M, K]: S_out = exp(log_transition)[..., None] S_in + it."""
        return self._summaries.of_segments

    def local(self) -> None:
        """Nothing: the sums have prepared the slots, and what is within chunks is added where the states were read."""

    def finish(self, initial_state: Tensor | None, *, return_state: bool) -> tuple[Tensor, Tensor | None]:
        """The scores [B, T, H, M], float32, and the states after each segment, or None."""
        this = self._pass
        entering = this.entering(initial_state, self._summaries.parts, forward=True)
        leaving = this.empty_part_states() if return_state else None
        scores = this.read_out(entering, leaving)
        return scores, None if leaving is None else this.of_segments(leaving, last=True)
