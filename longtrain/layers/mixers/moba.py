"""MoBA: each query attends to the blocks of keys whose means it likes best, and to its own."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from longtrain.kernels import softmax_attention
from longtrain.layers.cache import KeyValueCache
from longtrain.layers.chunks import Chunks, chunks_of
from longtrain.layers.mixers.base import ONE_TOKEN, Boundaries, LayerPlace, Mixer, check_prompt
from longtrain.layers.mixers.heads import RotaryHeads, check_rotary_heads
from longtrain.layers.recurrence import state_dtype
from longtrain.layers.rotary import rotate
from longtrain.parallel import SequenceShard, sequence_parallel_attention
from longtrain.parallel.picking import fetch, plan_picks

TILE = 2**24  # scores of queries and blocks that are held at once


@dataclass(frozen=True)
class MoBAConfig(RotaryHeads):
    """Options of the moba mixer."""

    block: int = 512  # L, tokens of a block
    picks: int | None = 3  # blocks that a query sees, its own among them; None: all, which is softmax attention


class MoBAState(NamedTuple):
    """What generation keeps: keys and values of all tokens, and the mean key of each whole block."""

    cache: KeyValueCache
    means: Tensor  # [B, size, G, K]; the first position // L rows hold something


class MoBAMixer(Mixer):
    """``y = W_o softmax(q_t K_I^T / sqrt(K)) V_I`` over the tokens up to t of the blocks I that query t picks.

    "MoBA: Mixture of Block Attention for Long-Context LLMs", section 2.2: keys lie in blocks of L tokens of a document;
    block i scores ``s_i = q_t . mean(K_i)`` (equation 6); a query sees its own block up to itself, and of the blocks
    before it the ``picks - 1`` with the highest scores (equations 7 and 8), head by head. Which blocks are picked has
    no gradient. q and k are rotated by positions first.

    Over ranks it runs where every rank holds whole blocks. The blocks' means travel to all ranks; then of K and V just
    the blocks that some query of a rank has picked travel there, each once for each key/value head that needs it, and
    in backward their gradients back. Queries of one block and head then are a document of their own whose keys are the
    block, and the parts are merged by log-sum-exp.
    """

    name: ClassVar[str] = "moba"
    Config: ClassVar[type[MoBAConfig]] = MoBAConfig

    @classmethod
    def check(cls, config: MoBAConfig, place: LayerPlace) -> None:
        check_rotary_heads(config, place)
        if config.block < 1:
            raise ValueError(f"block: got {config.block}, it must be at least 1")
        if config.picks is not None and config.picks < 1:
            raise ValueError(f"picks: got {config.picks}, it must be at least 1, the own block (null: all blocks)")

    @classmethod
    def pieces(cls, config: MoBAConfig) -> tuple[str, int]:
        return "block", config.block

    @classmethod
    def mixing_flops(cls, config: MoBAConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """4 H K for each pair of a query and a key that it sees, and 2 H K for each block mean that it scores."""
        lengths = np.diff(np.asarray(cu_seqlens, dtype=np.float64))
        if config.picks is None:
            pairs, scored = lengths * (lengths + 1) / 2, 0 * lengths
        else:
            whole, rest = np.divmod(lengths, config.block)
            inside = whole * config.block * (config.block + 1) / 2 + rest * (rest + 1) / 2
            most = config.picks - 1
            full = np.minimum(whole, most)  # blocks whose queries see all blocks before
            before = config.block * (full * (full - 1) / 2 + (whole - full) * most) + rest * np.minimum(whole, most)
            pairs = inside + config.block * before
            scored = config.block * whole * (whole - 1) / 2 + rest * whole
        each = config.heads * config.key_width(place.width) / max(lengths.sum(), 1)
        return float((4.0 * pairs.sum() + 2.0 * scored.sum()) * each)

    def __init__(self, config: MoBAConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads, self.groups, self.key_width = config.heads, config.groups, config.key_width(place.width)
        self.rope_base, self.block, self.picks = config.rope_base, config.block, config.picks
        self.qkv = nn.Linear(place.width, (self.heads + 2 * self.groups) * self.key_width, bias=False)
        self.out = nn.Linear(self.heads * self.key_width, place.width, bias=False)

    def prepare(self, shard: SequenceShard, *, device: torch.device, dtype: torch.dtype) -> None:
        chunks_of(shard, self.block)

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        if self.picks is None:
            q, k, v = self._project(x, shard.document_positions_on(x.device))
            return self.out(sequence_parallel_attention(q, k, v, shard)[0].flatten(2))
        blocks = chunks_of(shard, self.block)
        x = shard.relayout(x, blocks.home, dim=1)
        q, k, v = self._project(x, blocks.home.document_positions_on(x.device))
        y = self.out(self._attend(q, k, v, blocks, self.picks - 1).flatten(2))
        return blocks.home.relayout(y, shard, dim=1)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B, T_w, H, K]``, k and v ``[B, T_w, G, K]``; q and k rotated."""
        heads = self.qkv(x).unflatten(-1, (-1, self.key_width))
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=2)
        return rotate(q, positions, base=self.rope_base), rotate(k, positions, base=self.rope_base), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: Chunks, others: int) -> Tensor:
        """Own and picked blocks, ``[B, T_w, H, K]``; others: how many a query picks besides its own."""
        own, own_lse = self._own(q, k, v, blocks)
        if others == 0:
            return own
        batch, finished = q.shape[0], blocks.local_finished.on(q.device)
        whole = [blocks.grid(z).index_select(1, finished).movedim(1, 0) for z in (k, v)]  # [n, B, L, G, K]
        with torch.no_grad():
            means = blocks.finished.gather(whole[0].mean(2), dim=0)  # [N, B, G, K]
            chunk = blocks.places.on(q.device) // self.block  # of each token
            first, count = (z.on(q.device)[chunk] for z in (blocks.first_finished, blocks.numbers))
            picked = pick_blocks(q, means, first, count, others)  # [B, T_w, H, others]
            # What travels are units, one block for one row and key/value head, numbered block by block.
            units = batch * self.groups
            heads = torch.arange(self.heads, device=q.device) // (self.heads // self.groups)
            rows = torch.arange(batch, device=q.device)[:, None, None, None]
            unit = torch.where(picked >= 0, picked * units + rows * self.groups + heads[:, None], -1)
            needed = torch.zeros(means.shape[0] * units + 1, dtype=torch.bool, device=q.device)
            needed[unit.flatten()] = True  # no block, -1, is the last one, which is cut off
            sizes = [length * units for length in blocks.finished.lengths]
            picks = plan_picks(needed[:-1], sizes, blocks.home)
        pairs = torch.cat(whole, -1).transpose(2, 3).flatten(0, 2)  # [n B G, L, 2 K]
        keys, values = fetch(pairs, picks, blocks.home).chunk(2, -1)
        return _merged(q, own, own_lse, keys, values, torch.searchsorted(picks.picked, unit.clamp(min=0)), unit >= 0)

    def _own(self, q: Tensor, k: Tensor, v: Tensor, blocks: Chunks) -> tuple[Tensor, Tensor]:
        """Attention of each token to its own block up to itself: ``[B, T_w, H, K]`` and its lse."""
        # Inside a block its cells are a sequence; those that are empty lie after all others, where no token sees them.
        out, lse = softmax_attention(*(blocks.grid(z).flatten(0, 1) for z in (q, k, v)), causal=True)
        assert lse is not None
        own, own_lse = (blocks.tokens(z.unflatten(0, (q.shape[0], -1))) for z in (out, lse))
        return own, own_lse

    # ---- generation -------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["none", "growing", "constant"]:
        return "growing"

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> MoBAState:
        keys, values = torch.zeros(2, batch, 64, self.groups, self.key_width, device=device, dtype=dtype)
        return MoBAState(KeyValueCache(keys, values, 0), keys.new_zeros(batch, 4, self.groups, self.key_width))

    @torch.no_grad()  # keys and values are written in place
    def prefill(self, x: Tensor, shard: SequenceShard, state: MoBAState | None = None) -> tuple[Tensor, MoBAState]:
        check_prompt(shard)
        start = 0 if state is None else state.cache.position
        q, k, v = self._project(x, torch.arange(start, start + x.shape[1], device=x.device))
        state = self.empty_state(x.shape[0], x.device, k.dtype) if state is None else state
        after = self._extended(state, k, v)
        if self.picks is None:
            o, _ = softmax_attention(q, *(z.to(q.dtype) for z in after.cache.held()), causal=True)
        elif start == 0:
            o = self._attend(q, k, v, chunks_of(shard, self.block), self.picks - 1)
        else:
            # Few queries, one after the other: each has blocks of its own.
            outputs = [self._seen(q[:, i], after, start + i, self.picks - 1) for i in range(x.shape[1])]
            o = torch.stack(outputs, 1) if outputs else q
        return self.out(o.flatten(2)), after

    @torch.no_grad()
    def step(self, x: Tensor, state: MoBAState) -> tuple[Tensor, MoBAState]:
        y, state = self.prefill(x[:, None], ONE_TOKEN, state)
        return y[:, 0], state

    def _extended(self, state: MoBAState, k: Tensor, v: Tensor) -> MoBAState:
        """With further tokens, and the means of the blocks that they finish."""
        cache = state.cache.extended(k, v, ring=False)
        old, new, means = state.cache.position // self.block, cache.position // self.block, state.means
        if new > means.shape[1]:
            means = torch.cat((means, torch.zeros_like(means).repeat(1, -(-new // means.shape[1]), 1, 1)), 1)
        whole = cache.keys[:, old * self.block : new * self.block].unflatten(1, (new - old, self.block))
        means[:, old:new] = whole.mean(2)
        return MoBAState(cache, means)

    def _seen(self, q: Tensor, state: MoBAState, position: int, others: int) -> Tensor:
        """Attention of the token at a position, q ``[B, H, K]``, to the tokens of its blocks: ``[B, H, K]``."""
        number = position // self.block
        means = state.means[:, :number].movedim(1, 0).to(q.dtype)
        count = torch.full((1,), number, device=q.device)
        picked = pick_blocks(q[:, None], means, torch.zeros_like(count), count, others)[:, 0]  # [B, H, others]
        inside = torch.arange(self.block, device=q.device)
        rows = torch.where(picked[..., None] >= 0, picked[..., None] * self.block + inside, -1).flatten(2)
        own = torch.arange(number * self.block, position + 1, device=q.device).expand(*rows.shape[:2], -1)
        rows = torch.cat((own, rows), -1)  # [B, H, tokens]
        keys, values = (self._rows(z, rows.clamp(min=0)) for z in (state.cache.keys, state.cache.values))
        scores = (q[:, :, None].to(keys.dtype) * keys).sum(-1) * self.key_width**-0.5
        weights = torch.softmax(scores.masked_fill(rows < 0, -torch.inf), -1)
        return (weights[..., None] * values).sum(2).to(q.dtype)

    def _rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """x ``[B, S, G, K]``, rows ``[B, H, n]`` -> ``[B, H, n, K]`` in the state dtype."""
        spread = x.movedim(2, 1).repeat_interleave(self.heads // self.groups, 1)
        return spread.gather(2, rows[..., None].expand(-1, -1, -1, x.shape[3])).to(state_dtype(x.dtype))


def pick_blocks(q: Tensor, means: Tensor, first: Tensor, count: Tensor, others: int) -> Tensor:
    """For each query the blocks with the highest ``q . mean``, of those of its document before its own.

    Args:
        q: ``[B, T, H, K]``. means: ``[N, B, G, K]``, of all blocks.
        first, count: ``[T]`` int64; a token may pick from blocks first ... first + count - 1.
        others: how many.

    Returns:
        ``[B, T, H, others]`` int64, the best first, -1 where there are fewer.
    """
    blocks, groups = means.shape[0], means.shape[2]
    picked = torch.full((*q.shape[:3], others), -1, dtype=torch.int64, device=q.device)
    if not blocks or not others:
        return picked
    most, dtype, number = min(others, blocks), state_dtype(q.dtype), torch.arange(blocks, device=q.device)
    wide = means.to(dtype).permute(1, 2, 3, 0)[:, :, None]  # [B, G, 1, K, N]
    tile = max(TILE // max(q.shape[0] * q.shape[2] * blocks, 1), 1)
    for start in range(0, q.shape[1], tile):
        part = slice(start, start + tile)
        heads = q[:, part].to(dtype).movedim(1, 2).unflatten(1, (groups, -1))  # [B, G, H / G, t, K]
        scores = (heads @ wide).flatten(1, 2)  # [B, H, t, N]
        low, high = first[part, None], (first + count)[part, None]
        scores = scores.masked_fill((number < low) | (number >= high), -torch.inf)
        best, which = scores.topk(most, -1)
        picked[:, part, :, :most] = torch.where(best > -torch.inf, which, -1).movedim(2, 1)
    return picked


def _merged(
    q: Tensor, own: Tensor, own_lse: Tensor, keys: Tensor, values: Tensor, unit: Tensor, valid: Tensor
) -> Tensor:
    """One softmax over each query's own block and its picked ones, ``[B, T_w, H, K]``.

    q, own ``[B, T_w, H, K]``, own_lse ``[B, T_w, H]``; keys, values ``[n, L, K]``, the units here; unit, valid ``[B,
    T_w, H, others]``: which unit a query picked, and whether there is one.
    """
    units, length = keys.shape[:2]
    query, place, bounds = _by_unit(unit, valid, units)
    out, lse = softmax_attention(
        q.flatten(0, 2).index_select(0, query)[None, :, None],
        keys.flatten(0, 1)[None, :, None],
        values.flatten(0, 1)[None, :, None],
        causal=False,
        cu_seqlens=bounds,
        cu_seqlens_k=torch.from_numpy(np.arange(units + 1, dtype=np.int64) * length),
    )
    assert lse is not None
    lse = lse[0, :, 0]
    flat = own_lse.flatten()
    picked = torch.full((len(flat), valid.shape[3]), -torch.inf, dtype=lse.dtype, device=lse.device)
    total = torch.cat((flat[:, None], picked.index_put((query, place), lse)), 1).logsumexp(1)
    share = (lse - total[query]).exp()[:, None]
    merged = own.flatten(0, 2) * (flat - total).exp()[:, None]
    return merged.index_add(0, query, share * out[0, :, 0]).to(q.dtype).view_as(own)


def _by_unit(unit: Tensor, valid: Tensor, units: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which queries picked each unit: the queries of a unit are a document, whose keys are the unit.

    Returns:
        Unit by unit the queries, (row, token, head) as one number, which of its picks it was, and, on the CPU, the
        units' boundaries among these.
    """
    if isinstance(valid, FakeTensor):  # a dry run makes no choices: every pick is one, and all units are as popular
        every, others = torch.arange(valid.numel(), device=valid.device), valid.shape[3]
        bounds = np.linspace(0, valid.numel(), units + 1).astype(np.int64)
        return every // others, every % others, torch.from_numpy(bounds)
    query, place = valid.flatten(0, 2).nonzero(as_tuple=True)
    order = torch.argsort(unit[valid], stable=True)
    ends = torch.bincount(unit[valid], minlength=units).cumsum(0)
    return query[order], place[order], torch.cat((ends.new_zeros(1), ends)).cpu()
