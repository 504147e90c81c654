"""What both passes of linear attention on the Triton kernels are given and do alike: launches, and states of parts."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from longtrain.kernels import launching
from longtrain.kernels.launching import launch
from longtrain.kernels.linear_attention import configs, triton_channels, triton_forward, triton_tokens
from longtrain.kernels.linear_attention.plan import Plan, plan

NONE, HEAD, TOKEN, CHANNEL = range(4)  # forms of decay, as in the kernels


@dataclass(frozen=True)
class Rows:
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


class Pass:
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
        self.q, self.k, self.v = (self.as_rows(x) for x in (q, k, v))
        self.do = None if dout is None else self.as_rows(dout)
        self.scale, self.offsets, self.log_decay = float(scale), offsets, log_decay
        self.form = NONE if log_decay is None else {1: HEAD, 3: TOKEN, 4: CHANNEL}[log_decay.ndim]
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
        self.block_k, self.block_v = block_of(self.key_width), block_of(self.value_width)
        self.constants: dict[str, Any] = {
            "DECAY": self.form,
            "TYPE": tl.bfloat16 if self.kind == "half" else tl.float32,
            "PRECISION": precision,
            "C": self.size,
        }
        self.wide = {"WIDE": self.kind == "wide" and precision == "ieee"}
        self.plan = self._plan(short_parts)

    def as_rows(self, x: Tensor) -> Rows:
        return Rows(x if x.stride(3) == 1 or x.shape[3] == 1 and x.is_contiguous() else x.contiguous(), self.heads)

    def _plan(self, short: bool) -> Plan:
        blocks = blocks_of(self.value_width, configs.sweep(*self.key).constants["BO"])
        wanted = -(-configs.PROGRAMS[self.key[0]] // max(1, self.batch * self.heads * blocks))
        part = max(-(-self.tokens // wanted), configs.SHORTEST_PART)
        if short:
            part = min(part, configs.LONGEST_PART_WITH_DECAY_GRADIENT)
        return plan(self.offsets, size=self.size, part_tokens=part, device=self.device)

    @cached_property
    def prepared(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With decays per channel: readers, written [B, T, H, K], scores [B, T, H, C] and totals [B, M, H, K]."""
        readers, written = (self.empty(self.key_width, dtype=self.compute) for _ in range(2))
        scores = self.empty(self.size, dtype=self.compute)
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
        if self.form == CHANNEL:
            readers, written, _, totals = self.prepared
            b, factor = self.as_rows(written if forward else readers), 1.0
        added, logs = self.empty_part_states(), None
        if self.form != NONE:
            width = self.key_width if self.form == CHANNEL else 1
            logs = added.new_empty((*added.shape[:3], width))
        config = configs.part_states(*self.key)
        block_k = min(config.constants["BK"], self.block_k)
        block_v = min(config.constants["BV"], self.block_v)
        listed = self.plan.needed(forward=forward, whole=whole)
        blocks = blocks_of(self.key_width, block_k) * blocks_of(self.value_width, block_v)
        launch(
            triton_forward.part_states,
            (self.batch * self.heads * len(listed) * blocks,),
            *(b.tensor, c.tensor, self.log, totals, added, logs, self.plan.on_device, listed),
            *(*b.strides, *c.strides, b.share, c.share, self.heads, self.tokens),
            *(self.plan.count, len(listed), self.plan.chunks if self.form == CHANNEL else 0, factor),
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
        blocks = blocks_of(self.key_width, config.constants["BK"])
        blocks *= blocks_of(self.value_width, config.constants["BV"])
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
        entering = self.empty_part_states()
        self.scan(added, logs, initial, forward=forward, entering=entering)
        return entering

    @property
    def narrow_enough(self) -> bool:
        """`configs.narrow_enough`."""
        return configs.narrow_enough(*self.key, self.constants["PRECISION"])

    @property
    def by_tokens(self) -> bool:
        """Whether sweeps go token by token."""
        return self.form != CHANNEL and not self.narrow_enough

    def sweep(
        self,
        a: Rows,
        b: Rows,
        c: Rows,
        out: Tensor,
        *,
        forward: bool,
        transposed: bool,
        entering: Tensor | None,
        leaving: Tensor | None = None,
        scores: Tensor | None = None,
        plain: tuple[Rows, Rows] | None = None,
        other: Rows | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """`triton_forward.sweep` into `out` [B, T, H, c's width]; transposed: its state is [V, K].

        With scores, a and b have decays in them; plain: the same without. other: where given, other . out is returned,
        as far as it came through states and from other tokens of the chunk, each [blocks, B, T, H].
        """
        config = configs.sweep(*self.key, by_channel=self.form == CHANNEL)
        block = min(config.constants["BO"], block_of(c.width))
        blocks = blocks_of(c.width, block)
        programs = self.batch * self.heads * self.plan.count * blocks
        products = None if other is None else self.empty_products(blocks)
        way = {"forward": forward, "transposed": transposed, "entering": entering, "leaving": leaving}
        if self.by_tokens:
            self.sweep_tokens(a, b, c, out, **way, block=block, products=products, other=other, flags=None)
            return products
        totals, factor, chunks = None, self.scale, 0
        if self.form == CHANNEL:
            totals, factor, chunks = self.prepared[3], 1.0, self.plan.chunks
        # Without scores a token's result is its own product with the state, and reaches no other.
        flags = None if self.form == CHANNEL and scores is None else self.empty_flags(programs)
        launch(
            triton_forward.sweep,
            (programs,),
            *(a.tensor, b.tensor, c.tensor, out, scores, self.log, totals, entering, leaving, self.plan.on_device),
            *(*(products or (None, None)), None if other is None else other.tensor, flags),
            *(*a.strides, *b.strides, *c.strides, *((0, 0, 0) if other is None else other.strides)),
            *(a.share, b.share, c.share, 1 if other is None else other.share),
            *(self.heads, self.batch, self.tokens, self.plan.count, chunks, factor),
            config=config,
            REVERSE=not forward,
            TRANSPOSED=transposed,
            A=a.width,
            OUT=c.width,
            BA=block_of(a.width),
            BO=block,
            BY_ROWS=not self.narrow_enough,
            **self.constants,
            **self.wide,
        )
        if flags is not None:
            a, b = plain or (a, b)
            self.sweep_tokens(a, b, c, out, **way, block=block, products=products, other=other, flags=flags)
        return products

    def sweep_tokens(
        self,
        a: Rows,
        b: Rows,
        c: Rows,
        out: Tensor,
        *,
        forward: bool,
        transposed: bool,
        entering: Tensor | None,
        leaving: Tensor | None,
        block: int,
        products: tuple[Tensor, Tensor] | None,
        other: Rows | None,
        flags: Tensor | None,
    ) -> None:
        """`triton_tokens.sweep_tokens` with `block` columns of `out` for each program; flags None: all of them."""
        launch(
            triton_tokens.sweep_tokens,
            (self.batch * self.heads * self.plan.count * blocks_of(c.width, block),),
            *(a.tensor, b.tensor, c.tensor, out, self.log, entering, leaving, self.plan.on_device),
            *(*(products or (None, None)), None if other is None else other.tensor, flags),
            *(*a.strides, *b.strides, *c.strides, *((0, 0, 0) if other is None else other.strides)),
            *(a.share, b.share, c.share, 1 if other is None else other.share),
            *(self.heads, self.batch, self.tokens, self.plan.count, self.scale),
            config=configs.tokens(*self.key, products=products is not None, fixed=self.form == HEAD),
            REVERSE=not forward,
            DECAY=self.form,
            TRANSPOSED=transposed,
            A=a.width,
            OUT=c.width,
            C=self.size,
            BA=block_of(a.width),
            BO=block,
        )

    def log_transition(self) -> Tensor:
        """The sum of log_decay over each segment, [B, N, H, 1 or K], where no kernel had to look at the tokens."""
        shape = (self.batch, self.plan.segments, self.heads, 1)
        if self.log_decay is None:
            return self.v.tensor.new_zeros(shape, dtype=torch.float32)
        lengths = torch.from_numpy(np.diff(self.offsets)).to(self.device, torch.float32)[:, None]
        sums = torch.where(lengths > 0, lengths * self.log_decay.to(torch.float32), 0.0)
        return sums[None, ..., None].expand(shape)

    def empty(self, width: int, *, dtype: torch.dtype) -> Tensor:
        """[B, T, H, width]."""
        return self.v.tensor.new_empty((self.batch, self.tokens, self.heads, width), dtype=dtype)

    def empty_part_states(self) -> Tensor:
        shape = (self.batch, self.plan.count, self.heads, self.key_width, self.value_width)
        return self.v.tensor.new_empty(shape, dtype=torch.float32)

    def empty_products(self, blocks: int) -> tuple[Tensor, Tensor]:
        """Two of [blocks, B, T, H]."""
        shape = (blocks, self.batch, self.tokens, self.heads)
        through, within = (self.v.tensor.new_empty(shape, dtype=torch.float32) for _ in range(2))
        return through, within

    def empty_flags(self, programs: int) -> Tensor:
        return self.v.tensor.new_empty(programs, dtype=torch.float32)

    def of_segments(self, states: Tensor, *, last: bool) -> Tensor:
        """Of states [B, P, H, K, V] those of each segment's last or first part."""
        return states.index_select(1, self.plan.ends[last]) if self.plan.split else states


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


def block_of(width: int) -> int:
    """The power of two that holds a width, at least 16, which a matrix product needs."""
    return max(16, 1 << (width - 1).bit_length())


def blocks_of(width: int, block: int) -> int:
    """How many blocks it takes."""
    return -(-width // block)
