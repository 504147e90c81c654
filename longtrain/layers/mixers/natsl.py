"""NAtS-L: within one layer each chunk's keys go to a gated delta rule or to softmax, as a learned score says."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.kernels import gated_delta_rule, softmax_attention
from longtrain.kernels.precision import without_autocast
from longtrain.layers.attention import with_keys
from longtrain.layers.mixers.base import (
    ONE_TOKEN,
    Boundaries,
    LayerPlace,
    RecurrentMixer,
    check_prompt,
    check_scan_ranks,
    check_scan_strategy,
)
from longtrain.layers.mixers.heads import DeltaHeads, check_delta_heads
from longtrain.layers.norm import RMSNorm
from longtrain.layers.recurrence import scan_delta_rule, state_dtype
from longtrain.layers.rotary import rotate
from longtrain.layers.routing import RoutedChunks, routed_chunks
from longtrain.layers.selective import SelectiveDecay, strength, unit
from longtrain.layers.short_convolution import ShortConvolution, check_conv_width
from longtrain.parallel import SequenceShard, sequence_parallel_attention

SHARE = "softmax_share"


@dataclass(frozen=True)
class NATSLConfig(DeltaHeads):
    """Options of the natsl mixer: heads of the delta rule, each of which chooses for itself, and others."""

    attention_heads: int | None = None  # A, softmax heads, a multiple of H that cuts its heads; None: as many as heads
    chunk: int = 64  # L, tokens that are sent one way together, as the paper has it
    conv_width: int = 4  # tokens that the short convolutions of q, k and v see
    rope_base: float | None = 10_000.0  # of the softmax heads; null: no positions, as in the paper's hybrid models
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses

    @property
    def softmax_heads(self) -> int:
        return self.heads if self.attention_heads is None else self.attention_heads


class NATSLState(NamedTuple):
    """What generation keeps: a memory, the chunk under way, and the keys and values of chunks that went to softmax."""

    inputs: Tensor  # of the convolution, the last width - 1 [B, width - 1, C]
    memory: Tensor  # [B, H, K, V] after the last token, float32 (float64 for a float64 model)
    before: Tensor  # alike, before the chunk under way
    decay: Tensor  # [B, H], the sum of log-decays in the chunk under way
    total: Tensor  # [B, D], the sum of inputs in the chunk under way
    own_keys: Tensor  # [B, L, A, K'] of the chunk under way, of which position modulo L are there
    own_values: Tensor  # [B, L, A, V']
    keys: Tensor  # [B, H, size, A / H, K'] of chunks that went to softmax, head by head
    values: Tensor  # [B, H, size, A / H, V']
    counts: Tensor  # [B, H] int64, how many of these each head has
    position: int  # tokens so far


class NATSLMixer(RecurrentMixer):
    """``y = W_o (silu(W_g x) * (w_1 norm(o^softmax) + w_2 norm(o^delta)))``, (w_1, w_2) = softmax(W_w q).

    "Neural Attention Search Linear: Towards Adaptive Token-Level Hybrid Attention Models" (arXiv 2602.03681). From the
    paper and its code (github.com/automl/NeuralAttentionSearchLinear, natsl_attn_gdn.py) are:

    - chunks of L tokens of a document, whose scores are ``W_s mean(x) / sqrt(D)``, two for each head of the delta rule;
      the higher one says where the chunk's keys and values go. So a score decides what later chunks see of a chunk;
    - a query sees, by both ways, its own chunk up to itself, wherever that goes; by softmax the chunks before that went
      there; by the delta rule a state that the other ones have written and that every chunk's decays weaken;
    - q, k and v shared by both ways after one short convolution with SiLU; the delta rule's heads, whose q and k have
      length 1 and whose gates are Gated DeltaNet's, are cut into narrower softmax heads, whose q and k are RMS-normed;
    - the choice's gradient, straight through: it is 1 and 0 in the output and softmax(scores) in backward, and only the
      way that was chosen has one (the published setting). For softmax ``r`` multiplies a chunk's terms exp(q k), so its
      gradient is the sum of those of the chunk's scores q k for later chunks' queries.

    Ours: for the delta rule ``r`` multiplies the strengths beta with which a chunk writes to the state that later
    chunks see (the paper's kernel multiplies what is written by then); equal scores choose the delta rule; a document's
    last chunk has no score, since nobody asks; scores are computed in float32; the root of D, by which W_s is larger.

    Over ranks it runs where every rank holds whole chunks. The choices travel to all ranks, a byte for each chunk and
    head; then the keys and values that went to softmax, and no others, to the ranks that hold later tokens. The rows
    and heads, whose key sets differ, are documents of one long sequence (`longtrain.layers.routing`). The step's metric
    ``natsl.softmax_share`` is the share of chunks, over all heads, that went to softmax.
    """

    name: ClassVar[str] = "natsl"
    Config: ClassVar[type[NATSLConfig]] = NATSLConfig
    measures: ClassVar[tuple[str, ...]] = (SHARE,)

    @classmethod
    def check(cls, config: NATSLConfig, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        check_delta_heads(config, place)
        heads = config.softmax_heads
        if heads < 1 or heads % config.heads:
            near = max(heads // config.heads, 1) * config.heads
            raise ValueError(
                f"attention_heads: got {heads}, it must be a multiple of heads = {config.heads}: {near} would work"
            )
        parts = heads // config.heads
        for option, width in zip(("key_width", "value_width"), config.widths(place.width), strict=True):
            if width % parts:
                raise ValueError(f"{option}: got {width}, attention_heads cuts it into {parts}, which must divide it")
        if config.rope_base is not None and config.widths(place.width)[0] // parts % 2:
            raise ValueError(
                f"key_width: got {config.widths(place.width)[0]} for {parts} softmax heads each, rotary positions need "
                "an even number in each (rope_base: null turns none)"
            )
        if config.rope_base is not None and not config.rope_base > 1:
            raise ValueError(f"rope_base: got {config.rope_base}, it must be above 1 (null: no positions)")
        if config.chunk < 1:
            raise ValueError(f"chunk: got {config.chunk}, it must be at least 1")
        check_conv_width(config.conv_width)

    @classmethod
    def check_ranks(cls, config: NATSLConfig, *, strategy: str, ranks: int, rows: int) -> None:
        check_scan_ranks(config.strategy, heads=config.heads, ranks=ranks, rows=rows)

    @classmethod
    def pieces(cls, config: NATSLConfig) -> tuple[str, int]:
        return "chunk", config.chunk

    @classmethod
    def mixing_flops(cls, config: NATSLConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """6 H K V of the delta rule, and 2 H (K + V) for each pair of a query and a key that softmax sees.

        What that is the scores decide: half of the chunks before a query's own are counted.
        """
        lengths = np.diff(np.asarray(cu_seqlens, dtype=np.float64))
        whole, rest = np.divmod(lengths, config.chunk)
        own = whole * config.chunk * (config.chunk + 1) / 2 + rest * (rest + 1) / 2
        before = config.chunk * (config.chunk * whole * (whole - 1) / 2 + rest * whole)
        pairs = float((own + before / 2).sum()) / max(lengths.sum(), 1)
        key_width, value_width = config.widths(place.width)
        return config.heads * (6.0 * key_width * value_width + 2.0 * (key_width + value_width) * pairs)

    def __init__(self, config: NATSLConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads, self.softmax_heads = config.heads, config.softmax_heads
        self.key_width, self.value_width = config.widths(place.width)
        self.chunk, self.rope_base, self.strategy = config.chunk, config.rope_base, config.strategy
        keys, values = self.heads * self.key_width, self.heads * self.value_width
        self.sizes = keys, keys, values
        self.qkv = nn.Linear(place.width, sum(self.sizes), bias=False)
        self.convolution = ShortConvolution(sum(self.sizes), config.conv_width)
        # For softmax and the delta rule, head by head. Large weights on small inputs, and no matrix between channels:
        # an optimizer's first steps, which follow noise, would otherwise send all chunks one way, and the way that none
        # goes has no gradient to be found again by.
        self.scores = nn.Parameter(torch.randn(self.heads, 2, place.width))
        self.rates = nn.Linear(place.width, 2 * self.heads, bias=False)  # for beta, then for the decay
        self.decay = SelectiveDecay(self.heads)
        self.q_norm, self.k_norm = (RMSNorm(keys // self.softmax_heads, eps=1e-6) for _ in range(2))
        self.weights = nn.Linear(keys, 2 * self.softmax_heads, bias=False)  # of both ways' outputs, head by head
        self.softmax_norm, self.delta_norm = (RMSNorm(values // self.softmax_heads, eps=1e-6) for _ in range(2))
        self.gate = nn.Linear(place.width, values, bias=False)
        self.out = nn.Linear(values, place.width, bias=False)

    def prepare(self, shard: SequenceShard, *, device: torch.device, dtype: torch.dtype) -> None:
        routed_chunks(shard, self.chunk, self.heads)

    def mix(self, x: Tensor, shard: SequenceShard) -> Tensor:
        routed = routed_chunks(shard, self.chunk, x.shape[0] * self.heads)
        home = routed.chunks.home
        x = shard.relayout(x, home, dim=1)
        qkv, _ = self.convolution(self.qkv(x), home, None)
        finished = routed.chunks.local_finished.on(x.device)
        chosen, lift = self._choose(routed.chunks.grid(x).index_select(1, finished))
        picked = routed.agreed(chosen)
        self.measured = {SHARE: routed.share(picked)}
        near = self._split(qkv, home.document_positions_on(x.device))
        o = self._attend(*near, lift[..., 0], routed, picked)
        kept = torch.where(chosen, 0.0, 1.0 + lift[..., 1])
        y = self._close(x, qkv, o, self._remember(x, qkv, kept, routed))
        return home.relayout(y, shard, dim=1)

    # ---- what goes where --------------------------------------------------------------------------------------------

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of whole chunks ``[B, n, L, D]``: whether each goes to softmax ``[B, n, H]``, and 0 with the gradient of
        the softmax of its scores ``[B, n, H, 2]``."""
        return self._judge(x.to(state_dtype(x.dtype)).mean(2))

    def _judge(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(mean.device):
            weight = self.scores.to(mean.dtype).flatten(0, 1) * mean.shape[-1] ** -0.5
            scores = F.linear(mean, weight).unflatten(-1, (self.heads, 2))
        soft = scores.softmax(-1)
        return scores[..., 0] > scores[..., 1], soft - soft.detach()

    # ---- softmax ----------------------------------------------------------------------------------------------------

    def _split(self, qkv: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k ``[B, T_w, A, K']``, normed and turned, and v ``[B, T_w, A, V']`` of the softmax heads."""
        q, k, v = (z.unflatten(-1, (self.softmax_heads, -1)) for z in qkv.split(self.sizes, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_base is not None:
            q, k = (rotate(z, places, base=self.rope_base) for z in (q, k))
        return q, k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, lift: Tensor, routed: RoutedChunks, picked: np.ndarray
    ) -> Tensor:
        """Attention to the own chunk and to those before that went to softmax, ``[B, T_w, A, V']``."""
        chunks, batch = routed.chunks, q.shape[0]
        # Inside a chunk its cells are a sequence; those that are empty lie after all others, where no token sees them.
        own, own_lse = softmax_attention(*(chunks.grid(z).flatten(0, 1) for z in (q, k, v)), causal=True)
        assert own_lse is not None
        own, own_lse = (chunks.tokens(z.unflatten(0, (batch, -1))) for z in (own, own_lse))
        far, lse = self._far(q, k, v, lift, routed, picked)
        return with_keys(own, own_lse, far, lse)

    def _far(
        self, q: Tensor, k: Tensor, v: Tensor, lift: Tensor, routed: RoutedChunks, picked: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Attention to earlier chunks that went to softmax, ``[B, T_w, A, V']``, and its lse ``[B, T_w, A]``."""
        chunks, (batch, tokens) = routed.chunks, q.shape[:2]
        rows, finished = routed.rows(picked).on(q.device), chunks.local_finished.on(q.device)
        parts = self.softmax_heads // self.heads

        def copies(x: Tensor) -> Tensor:  # [B, n, .., A, C] -> [B H, n, .., A / H, C]
            return x.unflatten(-2, (self.heads, parts)).movedim(-3, 1).flatten(0, 1)

        def sent(x: Tensor) -> Tensor:  # [B, T_w, A, C] -> [1, tokens of picked chunks, A / H, C]
            whole = copies(chunks.grid(x).index_select(1, finished))
            return whole.flatten(0, 1).index_select(0, rows).flatten(0, 1)[None]

        # One more channel adds the choice's logarithm, 0 with a gradient, to the score. Up to a multiple of 8, at which
        # kernels are fast, the rest is 0.
        scale, more = q.shape[3] ** -0.5, -(q.shape[3] + 1) % 8
        keys, queries = sent(k), copies(q).flatten(0, 1)[None]
        chosen = lift.movedim(2, 1).flatten().index_select(0, rows) / scale
        chosen = chosen.repeat_interleave(self.chunk)[None, :, None, None].expand(-1, -1, parts, -1)
        keys = F.pad(torch.cat((keys, chosen.to(keys.dtype)), -1), (0, more))
        queries = F.pad(F.pad(queries, (0, 1), value=1.0), (0, more))
        out, lse = sequence_parallel_attention(
            queries, keys, sent(v), routed.queries, key_shard=routed.keys(picked), scale=scale, strategy="ring"
        )
        out, lse = out[0], lse[0, ..., None]
        out, lse = (z.unflatten(0, (batch, self.heads, tokens)).movedim(1, 2).flatten(2, 3) for z in (out, lse))
        return out, lse[..., 0]

    # ---- the delta rule ---------------------------------------------------------------------------------------------

    def _recurrent(self, x: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q and k ``[B, T_w, H, K]`` of length 1, v ``[B, T_w, H, V]``, beta and log-decay ``[B, T_w, H]``."""
        q, k, v = (z.unflatten(-1, (self.heads, -1)) for z in qkv.split(self.sizes, dim=-1))
        beta, rate = self.rates(x).chunk(2, dim=-1)
        return unit(q), unit(k), v, strength(beta), self.decay(rate)[1]

    def _remember(self, x: Tensor, qkv: Tensor, kept: Tensor, routed: RoutedChunks) -> Tensor:
        """The delta rule on a query's own chunk, from the state that the chunks before have left: ``[B, T_w, H, V]``.

        kept: ``[B, n, H]``, what multiplies the strengths of this rank's finished chunks for those after them.
        """
        chunks, batch = routed.chunks, x.shape[0]
        q, k, v, beta, log_decay = (chunks.grid(z) for z in self._recurrent(x, qkv))
        # Inside a chunk a state P S + E has become of the state S before it: from P = 1 and E = 0 on the rule finds q P
        # and q E, as values of K + V channels.
        start = torch.eye(self.key_width, dtype=state_dtype(q.dtype), device=q.device)
        start = F.pad(start, (self.value_width, 0)).expand(batch * q.shape[1], self.heads, -1, -1)
        rows = (z.flatten(0, 1) for z in (q, k, F.pad(v, (0, self.key_width)), beta, log_decay))
        inner, _ = gated_delta_rule(*rows, initial_state=start)
        inner, reads = inner.unflatten(0, (batch, -1)).split((self.value_width, self.key_width), dim=-1)
        # The states S themselves: each chunk twice, first to read with q P, then to write.
        last = torch.ones((batch, q.shape[1], self.heads), dtype=kept.dtype, device=q.device)
        kept = last.index_copy(1, chunks.local_finished.on(q.device), kept)
        reading = (reads, torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(beta), torch.zeros_like(log_decay))
        writing = (torch.zeros_like(reads), k, v, beta * kept[:, :, None], log_decay)
        q, k, v, beta, log_decay = (torch.cat(pair, 2).flatten(1, 2) for pair in zip(reading, writing, strict=True))
        before, _ = scan_delta_rule(q, k, v, beta, log_decay, routed.twice, None, scale=1.0, strategy=self.strategy)
        before = before.unflatten(1, (-1, 2 * self.chunk))[:, :, : self.chunk]
        return chunks.tokens(inner + before)

    def _close(self, x: Tensor, qkv: Tensor, attended: Tensor, remembered: Tensor) -> Tensor:
        """attended ``[B, T_w, A, V']``, remembered ``[B, T_w, H, V]`` -> y ``[B, T_w, D]``."""
        weights = self.weights(qkv[..., : self.sizes[0]]).unflatten(-1, (self.softmax_heads, 2))
        weights = weights.to(state_dtype(weights.dtype)).softmax(-1).to(attended.dtype)
        remembered = remembered.reshape(attended.shape)
        o = weights[..., :1] * self.softmax_norm(attended) + weights[..., 1:] * self.delta_norm(remembered)
        return self.out(o.flatten(2) * F.silu(self.gate(x)))

    # ---- generation -------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["none", "growing", "constant"]:
        return "growing"

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> NATSLState:
        memory = (batch, self.heads, self.key_width, self.value_width)
        inputs, first = self.convolution.empty_state(memory, device, dtype)
        parts = self.softmax_heads // self.heads
        key, value = self.key_width // parts, self.value_width // parts
        return NATSLState(
            inputs=inputs,
            memory=first,
            before=first.clone(),
            decay=first.new_zeros(batch, self.heads),
            total=first.new_zeros(batch, self.rates.in_features),
            own_keys=inputs.new_zeros(batch, self.chunk, self.softmax_heads, key),
            own_values=inputs.new_zeros(batch, self.chunk, self.softmax_heads, value),
            keys=inputs.new_zeros(batch, self.heads, self.chunk, parts, key),
            values=inputs.new_zeros(batch, self.heads, self.chunk, parts, value),
            counts=torch.zeros(batch, self.heads, dtype=torch.int64, device=device),
            position=0,
        )

    @torch.no_grad()  # keys and values are written in place
    def prefill(self, x: Tensor, shard: SequenceShard, state: NATSLState | None = None) -> tuple[Tensor, NATSLState]:
        check_prompt(shard)
        state = self.empty_state(x.shape[0], x.device, x.dtype) if state is None else state
        outputs, done = [], 0
        while done < x.shape[1]:
            size = min(self.chunk - state.position % self.chunk, x.shape[1] - done)
            y, state = self._piece(x[:, done : done + size], state)
            outputs, done = [*outputs, y], done + size
        return torch.cat(outputs, 1) if outputs else self.out(x.new_zeros(x.shape[0], 0, self.sizes[2])), state

    @torch.no_grad()
    def step(self, x: Tensor, state: NATSLState) -> tuple[Tensor, NATSLState]:
        y, state = self._piece(x[:, None], state)
        return y[:, 0], state

    def _piece(self, x: Tensor, state: NATSLState) -> tuple[Tensor, NATSLState]:
        """The next tokens of one chunk, ``[B, n, D]``, n >= 1."""
        tokens, inside = x.shape[1], state.position % self.chunk
        shard = ONE_TOKEN if tokens == 1 else SequenceShard(length=tokens)
        qkv, inputs = self.convolution(self.qkv(x), shard, state.inputs)
        assert inputs is not None
        q, k, v = self._split(qkv, torch.arange(state.position, state.position + tokens, device=x.device))
        state.own_keys[:, inside : inside + tokens], state.own_values[:, inside : inside + tokens] = k, v
        recurrent = self._recurrent(x, qkv)
        remembered, memory = scan_delta_rule(*recurrent, shard, state.memory, strategy=self.strategy)
        assert memory is not None
        y = self._close(x, qkv, self._seen(q, state, inside + tokens), remembered)
        after = state._replace(
            inputs=inputs,
            memory=memory,
            decay=state.decay + recurrent[-1].sum(1),
            total=state.total + x.to(state.total.dtype).sum(1),
            position=state.position + tokens,
        )
        return y, after if inside + tokens < self.chunk else self._finished(after)

    def _seen(self, q: Tensor, state: NATSLState, held: int) -> Tensor:
        """Softmax of queries ``[B, n, A, K']``, the last of the `held` tokens of the chunk under way, over these up to
        each and the keys of earlier chunks: ``[B, n, A, V']``."""
        dtype, tokens = state.memory.dtype, q.shape[1]
        own_keys, own_values, keys, values = (
            z.to(dtype) for z in (state.own_keys[:, :held], state.own_values[:, :held], state.keys, state.values)
        )
        with without_autocast(q.device):
            wide = q.to(dtype) * q.shape[3] ** -0.5
            own = torch.einsum("bnac,bmac->bnam", wide, own_keys)
            place = torch.arange(held, device=q.device)
            own = own.masked_fill((place > place[held - tokens :, None])[:, None], -torch.inf)
            far = torch.einsum("bnhpc,bhspc->bnhps", wide.unflatten(2, (self.heads, -1)), keys)
            free = torch.arange(keys.shape[2], device=q.device) >= state.counts[:, None, :, None, None]
            far = far.masked_fill(free, -torch.inf).flatten(2, 3)
            far, own = torch.cat((far, own), -1).softmax(-1).split((keys.shape[2], held), dim=-1)
            out = torch.einsum("bnhps,bhspc->bnhpc", far.unflatten(2, (self.heads, -1)), values).flatten(2, 3)
            out = out + torch.einsum("bnam,bmac->bnac", own, own_values)
        return out.to(q.dtype)

    def _finished(self, state: NATSLState) -> NATSLState:
        """At the end of a chunk: its keys and values join the earlier ones, or what it has written stays."""
        chosen, _ = self._judge(state.total / self.chunk)  # [B, H]
        counts = state.counts + self.chunk * chosen
        keys, values, most = state.keys, state.values, int(counts.max())
        if most > keys.shape[2]:
            more = max(most, 2 * keys.shape[2]) - keys.shape[2]
            keys, values = (torch.cat((z, z.new_zeros(*z.shape[:2], more, *z.shape[3:])), 2) for z in (keys, values))
        row, head = chosen.nonzero(as_tuple=True)
        places = state.counts[row, head][:, None] + torch.arange(self.chunk, device=row.device)
        for held, own in ((keys, state.own_keys), (values, state.own_values)):
            by_head = own.unflatten(2, (self.heads, -1)).movedim(2, 1)  # [B, H, L, A / H, K' or V']
            held[row[:, None], head[:, None], places] = by_head[row, head]
        weakened = state.before * state.decay.exp()[..., None, None]
        memory = torch.where(chosen[..., None, None], weakened, state.memory)
        return state._replace(
            memory=memory,
            before=memory,
            decay=torch.zeros_like(state.decay),
            total=torch.zeros_like(state.total),
            keys=keys,
            values=values,
            counts=counts,
        )
