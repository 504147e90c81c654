"""Mutations of the hybrid architectures: one for each mechanism of a layer."""

from tests.mutated.mutation import Mutation

MIXERS = "tests/layers/test_mixers.py::"


def loop(world: int, name: str, number: int = 0) -> str:
    """The test that compares a mixer with its paper's loop."""
    return f"{MIXERS}test_is_the_papers_loop_on_any_number_of_ranks[{world}-{name}-{number}]"


LAYERS = "longtrain/layers/"
CHUNKS, RAT, LIZARD = f"{LAYERS}chunks.py", f"{LAYERS}mixers/rat.py", f"{LAYERS}mixers/lizard.py"
AVERAGE, CONVOLUTION, MOBA = f"{LAYERS}moving_average.py", f"{LAYERS}long_convolution.py", f"{LAYERS}mixers/moba.py"
HYMBA, SHORT, MODEL = f"{LAYERS}mixers/hymba.py", f"{LAYERS}short_convolution.py", "longtrain/model.py"
UNIT, PICKING = f"{LAYERS}gated_unit.py", "parallel/picking.py"
HYBRID = "tests/layers/test_hymba.py::"
META = (f"{HYBRID}test_a_model_is_the_papers_loop_on_any_number_of_ranks[1-5]",)
NATSL, ROUTING = f"{LAYERS}mixers/natsl.py", f"{LAYERS}routing.py"
NATSL_TESTS, MEASURES = "tests/layers/test_natsl.py::", "tests/test_measures.py::"
PICKED = "tests/layers/test_routing.py::"
GRID = "tests/layers/test_chunks.py::test_every_rank_holds_whole_chunks"

MUTATIONS = (
    Mutation(
        "what-is-not-finite-reaches-a-whole-chunk",
        CHUNKS,
        "torch.where(counts > 0, torch.nan, sums)",
        "torch.where(counts[:, :, -1:] > 0, torch.nan, sums)",
        (f"{MIXERS}test_what_is_not_finite_reaches_no_earlier_token[nan-mega-0]",),
    ),
    Mutation(
        "filter-reaches-further-where-it-is-not-finite",
        CHUNKS,
        "torch.where(counts < counts[:, :, -1:], torch.nan, sums)",
        "torch.where(counts[:, :, -1:] > 0, torch.nan, sums)",
        ("tests/layers/test_chunks.py::test_a_filter_carries_what_is_not_finite_no_further_than_its_taps",),
    ),
    Mutation(
        "chunk-before-with-what-is-not-finite-in-its-own",
        CHUNKS,
        "flat = torch.where(flat.isfinite(), flat, largest)",
        "flat = flat.clone()",
        (f"{MIXERS}test_what_is_not_finite_reaches_no_earlier_token[inf-chela-0]",),
    ),
    Mutation(
        "chunks-cut-where-ranks-are",
        CHUNKS,
        "start = int(offsets[document]) + number * self.length",
        "start = position",
        (GRID,),
    ),
    Mutation(
        "rat-own-mean-left-out", RAT, "torch.sigmoid(own - lse)", "torch.sigmoid(own - lse - 9)", (loop(1, "rat"),)
    ),
    Mutation(
        "rat-chunks-number-forgotten",
        RAT,
        "turned = rotate(q, numbers, base=self.rope_base)",
        "turned = q",
        (loop(1, "rat"),),
    ),
    Mutation(
        "rat-keys-not-gated",
        RAT,
        "keep = torch.cat((keep, keep), -1)",
        "keep = torch.cat((keep * 0, keep), -1)",
        (loop(1, "rat"),),
    ),
    Mutation(
        "lizard-memory-tokens-left-out",
        LIZARD,
        "with_keys(near, lse, kept, weight)",
        "with_keys(near, lse, kept, weight - 9)",
        (loop(1, "lizard"),),
    ),
    Mutation("lizard-far-past-not-normalised", LIZARD, " / o[..., -1:]", "", (loop(1, "lizard"),)),
    Mutation(
        "lizard-memory-keys-turned",
        LIZARD,
        "self._close(self._with_memory(q, near, lse), far)\n\n    def _project",
        "self._close(self._with_memory(turned, near, lse), far)\n\n    def _project",
        (loop(1, "lizard"),),
    ),
    Mutation(
        "averages-of-other-chunks-forgotten",
        AVERAGE,
        "rates.carried(before, chunks.length))",
        "0 * rates.carried(before, chunks.length))",
        (loop(1, "mega"),),
    ),
    Mutation(
        "averages-lose-a-power", AVERAGE, "self.powers(1, length + 1)", "self.powers(0, length)", (loop(1, "mega"),)
    ),
    Mutation("averages-not-damped", AVERAGE, " * torch.sigmoid(delta))", ")", (loop(1, "mega"),)),
    Mutation("gated-unit-keeps-its-input", UNIT, "(candidate - x)", "candidate", (loop(1, "mega"), loop(1, "chela"))),
    Mutation(
        "long-filter-stops-at-its-chunk",
        CONVOLUTION,
        "self._sums(grid, chunks.before(grid))",
        "self._sums(grid, 0 * grid)",
        (loop(1, "chela"),),
    ),
    Mutation("long-filter-does-not-weaken", CONVOLUTION, " * 2.0**-scale", "", (loop(1, "chela"),)),
    Mutation(
        "moba-picks-later-blocks", MOBA, "(number >= high)", "(number > high)", (loop(1, "moba"), loop(2, "moba"))
    ),
    Mutation(
        "moba-parts-not-weighed",
        MOBA,
        "share = (lse - total[query]).exp()",
        "share = (lse * 0).exp()",
        (loop(1, "moba"),),
    ),
    Mutation(
        "fetched-gradients-not-summed",
        PICKING,
        "total[sends[part]] += back[part]",
        "total[sends[part]] = back[part].to(total.dtype)",
        (loop(2, "moba"), loop(3, "moba")),
    ),
    Mutation(
        "hymba-meta-keys-hardly-seen",
        HYMBA,
        "with_keys(near, lse, kept, weight)",
        "with_keys(near, lse, kept, weight - 9)",
        META,
    ),
    Mutation(
        "hymba-text-begins-where-meta-tokens-do",
        HYMBA,
        "where = where + (before + self.meta)",
        "where = where + before",
        META,
    ),
    Mutation("hymba-documents-start-empty", HYMBA, "o = o + (left *", "o = o + 0 * (left *", META),
    Mutation("hymba-first-decay-forgotten", HYMBA, "(log_decay.exp() * begins)", "(0 * log_decay + begins)", META),
    Mutation(
        "hymba-convolution-starts-empty",
        SHORT,
        "sums.index_select(1, places.on(x.device))",
        "0 * sums.index_select(1, places.on(x.device))",
        META,
    ),
    Mutation(
        "meta-tokens-of-another-rank-forgotten",
        MODEL,
        "self.meta_embedding.to(x.dtype)",
        "self.meta_embedding.detach()",
        META,
    ),
    Mutation(
        "shared-keys-without-gradient",
        MODEL,
        "(found[0], found[1:])",
        "(found[0], tuple(part.detach() for part in found[1:]))",
        META,
    ),
    Mutation(
        "hymba-readers-have-no-meta-keys",
        HYMBA,
        "return self._joined(q, near, lse, k[:, :meta], v[:, :meta])",
        "return self._joined(q, near, lse + 9 * self.share_kv, k[:, :meta], v[:, :meta])",
        META,
    ),
    Mutation(
        "hymba-attention-not-normalised",
        HYMBA,
        "self.attention_norm(attended.flatten(2))",
        "attended.flatten(2) + 0 * self.attention_norm(attended.flatten(2))",
        (loop(1, "hymba"),),
    ),
    Mutation(
        "hymba-old-keys-overwritten-first",
        HYMBA,
        "old = zip(state.cache.in_order(), (keys, values), strict=True)",
        "old = zip(state.cache.extended(keys, values, ring=True).held(), (keys, values), strict=True)",
        (f"{HYBRID}test_generation_is_the_parallel_form",),
    ),
    Mutation(
        "natsl-own-chunk-left-out",
        NATSL,
        "with_keys(own, own_lse, far, lse)",
        "with_keys(own, own_lse, far, lse + 9)",
        (loop(1, "natsl"),),
    ),
    Mutation(
        "natsl-choices-without-gradient-in-softmax",
        NATSL,
        "lift.movedim(2, 1).flatten()",
        "lift.detach().movedim(2, 1).flatten()",
        (loop(1, "natsl"),),
    ),
    Mutation(
        "natsl-choices-without-gradient-in-the-delta-rule",
        NATSL,
        "1.0 + lift[..., 1])",
        "1.0 + lift[..., 1].detach())",
        (loop(1, "natsl"),),
    ),
    Mutation(
        "natsl-softmax-chunks-write-to-the-state",
        NATSL,
        "beta * kept[:, :, None]",
        "beta + 0 * kept[:, :, None]",
        (loop(1, "natsl"), loop(2, "natsl")),
    ),
    Mutation(
        "natsl-softmax-chunks-do-not-weaken-the-state",
        NATSL,
        "beta * kept[:, :, None], log_decay)",
        "beta * kept[:, :, None], log_decay * (kept > 0)[:, :, None])",
        (loop(1, "natsl"),),
    ),
    Mutation(
        "natsl-outputs-not-weighed",
        NATSL,
        "weights[..., :1] * self.softmax_norm",
        "0.5 * self.softmax_norm",
        (loop(1, "natsl"),),
    ),
    Mutation(
        "natsl-generates-from-the-chunks-own-state",
        NATSL,
        "torch.where(chosen[..., None, None], weakened, state.memory)",
        "state.memory",
        (f"{MIXERS}test_steps_are_the_parallel_form[dtype0-1e-10-natsl-0]",),
    ),
    Mutation(
        "routed-keys-seen-from-their-own-chunk",
        ROUTING,
        "(number + 1) * chunks.length",
        "number * chunks.length",
        (
            f"{PICKED}test_queries_see_the_picked_keys_of_earlier_chunks_of_their_document",
            f"{NATSL_TESTS}test_a_choice_has_no_part_in_its_own_chunk",
        ),
    ),
    Mutation(
        "measures-counted-twice",
        "longtrain/measures.py",
        "self._taken = []\n        return",
        "return",
        (f"{MEASURES}test_sums_over_layers_and_passes_by_name",),
    ),
    Mutation(
        "measures-of-one-rank-only",
        "longtrain/trainer.py",
        "dist.all_reduce(sums)",
        "dist.all_reduce(sums[:1])",
        (f"{MEASURES}test_the_first_steps_share_is_what_weights_and_tokens_say",),
    ),
)
