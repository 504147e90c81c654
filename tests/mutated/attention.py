"""Mutations of softmax attention over ranks, and of one device's part in it."""

from tests.mutated.mutation import Mutation

STRATEGIES = "tests/parallel/test_strategies.py::test_every_strategy_is_the_dense_softmax"
ALONE, TWO, THREE, FOUR = (f"{STRATEGIES}[{world}-1]" for world in (1, 2, 3, 4))
ROWS = f"{STRATEGIES}[4-2]"
ODD = "tests/parallel/test_strategies.py::test_sequences_shorter_than_the_group_and_of_any_length[4-1]"
MASKS = "tests/parallel/test_masks.py::test_intervals_of_all_ranks_are_the_dense_mask"
CROSS_MASKS = "tests/parallel/test_masks.py::test_intervals_on_another_sequences_keys_are_the_dense_mask"
VISIBLE = "tests/kernels/test_intervals.py::test_visible_keys_are_the_dense_mask"
MESSAGES = "tests/parallel/test_attention_calls.py::test_messages_are_those_of_the_ring[3]"
LAYOUTS = "tests/parallel/test_layouts.py::test_every_layout_holds_and_counts_what_it_says"
NAN = "tests/parallel/test_attention.py::test_nan_stays_in_its_document_and_head"
RECOMPUTE = (
    "tests/parallel/test_recompute.py::test_kept_attention_repeats_no_message_and_recomputed_attention_one_forward"
)
TOLD = "tests/parallel/test_agreement.py::test_every_rank_is_told_what_each_gave[scale-]"
GAPS = "tests/parallel/test_attention_gaps.py::"
ROUNDED = GAPS + "test_bfloat16_loses_nothing_over_ranks"

HEADS = "tests/parallel/test_attention_heads.py::test_groups_of_heads_are_all_heads[1]"
FLOAT32 = "tests/parallel/test_attention_heads.py::test_what_is_float32_lives_for_one_group"

RING, GATHER = "parallel/attention/ring.py", "parallel/attention/gather.py"
NEEDS, PLAN = "parallel/attention/needs.py", "parallel/attention/plan.py"
ULYSSES, STEPS = "parallel/heads.py", "parallel/attention/strategies.py"
CALL, OPERATORS = "parallel/attention/__init__.py", "parallel/attention/operators.py"
SAVING = "parallel/saving.py"
BOUNDS, LAYOUT, RUNS = "parallel/bounds.py", "parallel/layouts.py", "parallel/layout_base.py"
INTERVALS, TILES = "kernels/intervals.py", "kernels/softmax_attention/torch_impl.py"
KERNEL = "kernels/softmax_attention/__init__.py"

MUTATIONS = (
    # Which keys a query sees.
    Mutation("lo-off-by-one", BOUNDS, "KeyIntervals(lo=lo,", "KeyIntervals(lo=np.minimum(lo + 1, hi),", (MASKS,)),
    Mutation("hi-off-by-one", BOUNDS, "lo=lo, hi=hi,", "lo=lo, hi=np.maximum(hi - 1, lo),", (MASKS,)),
    Mutation("tile-mask-off-by-one", INTERVALS, "(key < self.hi[", "(key <= self.hi[", (ALONE,)),
    Mutation("window-left-off-by-one", INTERVALS, "clip(own - left,", "clip(own - left + 1,", (VISIBLE,)),
    Mutation("window-right-off-by-one", INTERVALS, "own + right + 1,", "own + right,", (VISIBLE,)),
    Mutation(
        "cross-attention-aligned-at-the-start",
        INTERVALS,
        "positions - query_offsets[document + 1] + key_stop",
        "positions - query_offsets[document] + key_start",
        (CROSS_MASKS,),
    ),
    Mutation(
        "documents-ignored",
        INTERVALS,
        "key_start if left is None",
        "np.zeros_like(key_start) if left is None",
        (MASKS,),
    ),
    Mutation(
        "zigzag-count-off-by-one",
        LAYOUT,
        "positions, chunks - 1 - rank",
        "positions + 1, chunks - 1 - rank",
        (LAYOUTS,),
    ),
    Mutation(
        "balanced-count-off-by-one",
        RUNS,
        "np.clip(positions - starts[run], 0, lengths[run])",
        "np.clip(positions + 1 - starts[run], 0, lengths[run])",
        (LAYOUTS,),
    ),
    # One device's arithmetic on a block of keys.
    Mutation("merge-guard-forgotten", TILES, ".masked_fill_(tile_lse == -torch.inf, 0)", "", (TWO,)),
    Mutation(
        "scale-applied-twice",
        TILES,
        "scale=1.0,\n            )\n            if unseeing",
        "scale=scale,\n            )\n            if unseeing",
        (ALONE,),
    ),
    Mutation("softcap-derivative-forgotten", TILES, "dscores *= 1 - (scores / softcap).square_()", "pass", (ALONE,)),
    Mutation("lse-gradient-dropped", TILES, "out, dout = _with_lse_gradient(out, dout, dlse)", "pass", (ALONE,)),
    Mutation("lse-gradient-dropped-under-softcap", TILES, "delta if dlse is None else delta - dlse", "delta", (ALONE,)),
    Mutation("nan-containment-dropped", TILES, "if not all_finite(q, k, v):", "if False:", (NAN,)),
    Mutation(
        "nan-containment-dropped-in-backward",
        TILES,
        "if not all_finite(q, k, v, out, lse, dout, dlse):",
        "if False:",
        (NAN,),
    ),
    # Sinks.
    Mutation("sinks-forgotten", CALL, "apply_sinks(out, lse, sinks)", "apply_sinks(out, lse, 0 * sinks)", (ALONE,)),
    Mutation(
        "sinks-with-half-their-gradient",
        KERNEL,
        "- sinks.to(lse.dtype)",
        "- (0.5 * (sinks + sinks.detach())).to(lse.dtype)",
        (ALONE,),
    ),
    Mutation(
        "sinks-join-a-rounded-out",
        CALL,
        "wide=sinks is not None",
        "wide=False",
        (ROUNDED + "[ring]",),
    ),
    # The ring.
    Mutation(
        "round-skipped",
        RING,
        "            _attend(q, block, round_.intervals,",
        "            if following or len(stage.rounds) == 1:\n                _attend(q, block, round_.intervals,",
        (TWO,),
    ),
    Mutation(
        "dk-and-dv-swapped",
        RING,
        "dk=into[0],\n            dv=into[1],",
        "dk=into[1],\n            dv=into[0],",
        (ROUNDED + "[ring]",),
    ),
    Mutation(
        "dq-of-the-last-block-only",
        RING,
        "        attention_backward(\n            self._q,",
        "        self._dq.zero_()\n        attention_backward(\n            self._q,",
        (TWO,),
    ),
    Mutation(
        "partial-results-rounded",
        RING,
        "            if inner is not None:\n                inner.wait()",
        "            out.copy_(out.to(q.dtype))\n            if inner is not None:\n                inner.wait()",
        (ROUNDED + "[ring]",),
    ),
    Mutation(
        "partial-lse-rounded",
        RING,
        "            if inner is not None:\n                inner.wait()",
        "            lse.copy_(lse.to(q.dtype))\n            if inner is not None:\n                inner.wait()",
        (ROUNDED + "[ring]",),
    ),
    Mutation(
        "shares-in-flight-rounded",
        RING,
        "else (round_, mine)",
        "else (round_, [x.to(base[0].dtype).to(x.dtype) for x in mine])",
        (ROUNDED + "[ring]",),
    ),
    Mutation(
        "sums-of-a-row-rounded",
        RING,
        "links.across((stage.sender, sums),",
        "links.across((stage.sender, [x.to(own[0].dtype).to(x.dtype) for x in sums]),",
        (ROUNDED + "[double ring]",),
    ),
    Mutation("part-one-key-too-small", NEEDS, "int(hi[seen[-1]]))", "int(hi[seen[-1]]) - 1)", (TWO,)),
    Mutation(
        "part-one-key-too-large",
        NEEDS,
        "Part(int(lo[seen[0]]),",
        "Part(max(int(lo[seen[0]]) - 1, 0),",
        (GAPS + "test_windows_send_only_what_is_seen",),
    ),
    Mutation("part-from-the-wrong-start", PLAN, "ends - part.start, 0,", "ends, 0,", (FOUR,)),
    Mutation("hull-of-the-first-reader", NEEDS, "max(part.stop for part in parts)", "parts[0].stop", (ROWS,)),
    Mutation(
        "shares-added-to-wrong-rows",
        RING,
        "total[:, part.start : part.stop] += share",
        "total[:, : part.size] += share",
        (FOUR,),
    ),
    Mutation(
        "last-row-s-shares-lost",
        RING,
        "        _deliver(returning, home)\n    dk, dv",
        "        pass\n    dk, dv",
        (ROWS,),
    ),
    Mutation(
        "held-keys-in-the-wrong-round",
        RING,
        "following is rounds[-1]",
        "following is rounds[len(rounds) // 2]",
        (THREE,),
    ),
    Mutation("held-keys-under-recompute", SAVING, "top(False) is None", "True", (f"{RECOMPUTE}[2]",)),
    Mutation(
        "backward-repeats-forward",
        STEPS,
        "        state, dtypes, groups =",
        "        attention_forward_over_ranks(q, k, v, call, wide=False, keep=False)\n        state, dtypes, groups =",
        (MESSAGES,),
    ),
    Mutation(
        "kept-attention-runs-again",
        STEPS,
        "        state, dtypes, groups =",
        "        if not held:\n            attention_forward_over_ranks(q, k, v, call, wide=False, keep=False)\n"
        "        state, dtypes, groups =",
        (GAPS + "test_kept_attention_sends_nothing_of_forward_again",),
    ),
    # The gather.
    Mutation(
        "gathered-from-the-wrong-offset",
        GATHER,
        "message[: sum(sizes)]",
        "message[len(message) - sum(sizes) :]",
        (THREE,),
    ),
    Mutation("gathered-shares-cut-wrong", GATHER, "x[:, seen.start : seen.stop]", "x[:, : seen.size]", (FOUR,)),
    Mutation("gathered-heads-skipped", GATHER, "        under_way = _send_shares(", "        _send_shares(", (TWO,)),
    Mutation(
        "gathered-partial-results-rounded",
        GATHER,
        "            if not intervals.area:\n                continue\n            attention_forward(",
        "            out.copy_(out.to(q.dtype))\n            attention_forward(",
        (ROUNDED + "[allgather]",),
    ),
    # Ulysses.
    Mutation("wrong-key-head", ULYSSES, "(member * own + first) // share", "member * own // share", (TWO, FOUR)),
    Mutation("key-head-copies-not-summed", ULYSSES, "head] += part", "head] = part", (TWO, FOUR)),
    Mutation(
        "key-head-copies-rounded",
        STEPS,
        "exchange.to_tokens(grads[:1], grads[1:], groups)",
        "exchange.to_tokens(grads[:1], [x.to(dtypes[1]).to(state) for x in grads[1:]], groups)",
        (ROUNDED + "[ulysses]",),
    ),
    Mutation("team-places-wrong", ULYSSES, "np.asarray(counted,", "np.asarray(np.roll(counted, 1),", (TWO,)),
    Mutation("team-keys-placed-as-queries", ULYSSES, "if key_shard is shard else", "if True else", (TWO,)),
    Mutation(
        "lse-gradient-not-exchanged",
        STEPS,
        "torch.zeros_like(lse) if dlse is None else dlse",
        "torch.zeros_like(lse)",
        (TWO,),
    ),
    # Some heads at a time.
    Mutation("last-heads-left-out", STEPS, "range(0, groups, at_once)", "range(0, groups - 1, at_once)", (HEADS,)),
    Mutation("query-heads-begin-early", STEPS, "slice(start * share,", "slice(max(start - 1, 0) * share,", (HEADS,)),
    Mutation("heads-never-apart", STEPS, "min(call.heads_at_once or groups, groups)", "groups", (FLOAT32,)),
    # The handshake.
    Mutation("handshake-dropped", OPERATORS, "    agree(shard, signature, device=q.device)", "    pass", (TOLD,)),
)
