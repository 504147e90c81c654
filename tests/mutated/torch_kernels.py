"""Mutations of the operators' PyTorch paths."""

from tests.mutated.mutation import Mutation

LINEAR, EDGES = "tests/kernels/test_linear_attention.py::", "tests/kernels/test_linear_attention_edges.py::"
DELTA, SLOTS = "tests/kernels/test_gated_delta_rule.py::", "tests/kernels/test_gated_slot_attention.py::"
CONV, LOSS = "tests/kernels/test_causal_conv1d.py::", "tests/kernels/test_linear_cross_entropy.py::"
REFERENCE = "test_torch_is_the_reference"
SHARED = "test_queries_and_keys_may_be_shared_differently"  # float64, slow decays, packed documents with ragged ends
PIECES = "test_two_pieces_joined_by_their_summaries_are_one"
OF_TOKENS = f"{EDGES}{PIECES}[token-64-2-True]"
OF_DELTA = f"{DELTA}{PIECES}[token-64-2-matrix]"
TRAVEL = "test_ranks_compute_while_messages_travel_and_the_numbers_are_the_same"
HALOS = f"{CONV}test_pieces_with_halos_are_the_whole[torch-30]"

DECAYS, CHUNKING = "kernels/linear_attention/decays.py", "kernels/linear_attention/chunking.py"
CHUNKS, TILES = "kernels/linear_attention/torch_impl.py", "kernels/linear_attention/tiles.py"
ERASING, PAIRS = "kernels/gated_delta_rule/torch_impl.py", "kernels/gated_delta_rule/pairs.py"
SLOT_PASSES, SLOT_SCORES = "kernels/gated_slot_attention/passes.py", "kernels/gated_slot_attention/torch_impl.py"
CONVOLUTION = "kernels/causal_conv1d/torch_impl.py"
LOOP, LOSS_STEPS = "kernels/linear_cross_entropy/loop.py", "kernels/linear_cross_entropy/torch_impl.py"

MUTATIONS = (
    # Linear attention: inside chunks, from chunk to chunk, from segment to segment.
    Mutation("chunk-mask-dropped", DECAYS, "clamp_(max=0)).tril_()", "clamp_(max=0))", (f"{LINEAR}{SHARED}[token]",)),
    Mutation(
        "fixed-decay-read-one-token-early",
        DECAYS,
        "powers[None, :, 1:, None]",
        "powers[None, :, :-1, None]",
        (f"{LINEAR}{SHARED}[head]",),
    ),
    Mutation(
        "ragged-tail-loses-a-whole-chunk",
        DECAYS,
        "through[run.stop - 1] = self._powers[run.rest]",
        "through[run.stop - 1] = self._powers[tile.size]",
        (f"{LINEAR}{SHARED}[head]",),
    ),
    Mutation(
        "ragged-tail-written-with-the-wrong-powers",
        DECAYS,
        "self._to_end[0, :, tile.size - run.rest :]",
        "self._to_end[0, :, : run.rest]",
        (f"{LINEAR}{SHARED}[head]",),
    ),
    Mutation(
        "own-decay-in-what-is-written",
        DECAYS,
        "F.pad(_sums_from(log, -1)[..., 1:], (0, 1))",
        "_sums_from(log, -1)",
        (f"{LINEAR}{SHARED}[token]",),
    ),
    Mutation(
        "half-chunks-rise-forgotten",
        DECAYS,
        "second += total[:, :1]",
        "second += 0 * total[:, :1]",
        (f"{LINEAR}{SHARED}[channel]",),
    ),
    Mutation("decay-gradient-of-pairs-dropped", DECAYS, "+ within[..., None])", ")", (f"{LINEAR}{SHARED}[token]",)),
    Mutation(
        "states-stop-at-chunks",
        CHUNKS,
        "_add(rows[i + 1], rows[i], None if through is None else through[i])",
        "pass",
        (f"{LINEAR}{SHARED}[token]",),
    ),
    Mutation(
        "chunk-carry-off-by-one",
        CHUNKS,
        "_add(rows[i + 1], rows[i], None if through is None else through[i])",
        "_add(rows[i + 1], rows[i], None if through is None else through[i - 1])",
        (f"{LINEAR}{SHARED}[token]",),
    ),
    Mutation(
        "chunk-carry-off-by-one-in-backward",
        CHUNKS,
        "_add(rows[i], rows[i + 1], None if through is None else through[i])",
        "_add(rows[i], rows[i + 1], None if through is None else through[i - 1])",
        (f"{LINEAR}{SHARED}[token]",),
    ),
    Mutation(
        "states-stop-at-tiles",
        CHUNKS,
        "            carried = states[-1]\n",
        "            carried = 0 * states[-1]\n",
        (f"{LINEAR}{REFERENCE}",),
    ),
    Mutation(
        "gradients-of-states-stop-at-tiles",
        CHUNKS,
        "            carried = dstates[0]\n",
        "            carried = 0 * dstates[0]\n",
        (f"{LINEAR}{REFERENCE}",),
    ),
    Mutation(
        "segment-transition-zeroed",
        DECAYS,
        "return torch.stack([x.sum(1) for x in",
        "return torch.stack([x.sum(1) - torch.inf for x in",
        (OF_TOKENS,),
    ),
    Mutation(
        "documents-start-where-the-row-does",
        CHUNKING,
        "first, last = at == start,",
        "first, last = at == 0,",
        (f"{LINEAR}{SHARED}[token]",),
    ),
    Mutation(
        "what-chunks-add-rounded",
        TILES,
        "return _outer_products(self.written, self.v, first=1)",
        "return _outer_products(self.written, self.v, first=1).to(self._inputs.q.dtype).to(self._inputs.dtype)",
        (f"{LINEAR}test_halves_are_computed_in_float32[dtype0-torch]",),
    ),
    # The delta rule.
    Mutation(
        "nothing-is-erased",
        ERASING,
        "stored[i].baddbmm_(w[i], state, alpha=-1)",
        "pass",
        (f"{DELTA}{SHARED}[token]",),
    ),
    Mutation(
        "delta-transition-zeroed",
        ERASING,
        "torch.cat((identity.expand(",
        "torch.cat((0 * identity.expand(",
        (OF_DELTA,),
    ),
    Mutation(
        "delta-transition-without-decay",
        ERASING,
        "_times(both[run.segment], through, i)",
        "both[run.segment]",
        (OF_DELTA,),
    ),
    Mutation(
        "delta-carry-off-by-one",
        ERASING,
        "_times(state, through, i), written[i]",
        "_times(state, through, i - 1), written[i]",
        (f"{DELTA}{SHARED}[token]",),
    ),
    Mutation(
        "gradient-does-not-see-the-erasing",
        ERASING,
        "return before.baddbmm_(work.w[i].transpose(1, 2), du, alpha=-1)",
        "return before",
        (f"{DELTA}{SHARED}[token]",),
    ),
    Mutation(
        "erasing-decays-one-way-only",
        PAIRS,
        "product(da + da.transpose(2, 3), k)",
        "product(da, k)",
        (f"{DELTA}{SHARED}[token]",),
    ),
    # Slots.
    Mutation(
        "slot-state-gradients-swapped",
        "kernels/gated_slot_attention/operators.py",
        "dinitial_keys.to(initial_keys.dtype), dinitial_values.to(initial_values.dtype)",
        "dinitial_values.to(initial_keys.dtype), dinitial_keys.to(initial_values.dtype)",
        (f"{SLOTS}{REFERENCE}",),
    ),
    Mutation(
        "slot-gradient-of-one-pass", SLOT_PASSES, "_wide(dslot) + self._dslot", "_wide(dslot)", (f"{SLOTS}{REFERENCE}",)
    ),
    Mutation("slot-decay-gradient-of-one-pass", SLOT_PASSES, "dlog + self._dlog", "dlog", (f"{SLOTS}{REFERENCE}",)),
    Mutation(
        "slot-softmax-gradient-without-its-mean",
        SLOT_SCORES,
        "return shares.sub_(weights * shares.sum(-1, keepdim=True))",
        "return shares",
        (f"{SLOTS}{REFERENCE}",),
    ),
    # The convolution.
    Mutation("halo-dropped", CONVOLUTION, "z[:, self.edge[part] - start] += self.edge_sums[:, part]", "pass", (HALOS,)),
    Mutation("halo-gradient-dropped", CONVOLUTION, "dhalo[:, segments, rows] += self.taps[k] * dz", "pass", (HALOS,)),
    Mutation("halo-of-another-document", CONVOLUTION, " & (ago <= counts[segments])", "", (f"{CONV}{REFERENCE}",)),
    Mutation(
        "taps-gradient-without-the-halo",
        CONVOLUTION,
        "dtaps[k] += (dz * self.halo",
        "dtaps[k] += 0 * (dz * self.halo",
        (HALOS,),
    ),
    Mutation(
        "convolution-reads-other-documents",
        CONVOLUTION,
        "self.positions[start:stop] >= k",
        "self.positions[start:stop] >= 0",
        (f"{CONV}test_it_is_the_convolution_of_torch[4-None-torch]",),
    ),
    # Cross-entropy.
    Mutation(
        "ignored-tokens-counted",
        LOOP,
        "return torch.where(counts, losses, 0),",
        "return losses,",
        (f"{LOSS}{REFERENCE}",),
    ),
    Mutation(
        "ignored-tokens-have-gradients",
        LOOP,
        "dlosses = torch.where(counts, dlosses.to(dtype), 0)",
        "dlosses, counts = dlosses.to(dtype), counts | True",
        (f"{LOSS}{REFERENCE}",),
    ),
    Mutation(
        "z-loss-dropped",
        LOOP,
        "lse - own + options.z_loss * lse.square() if options.z_loss else lse - own",
        "lse - own",
        (f"{LOSS}{REFERENCE}",),
    ),
    Mutation(
        "z-loss-gradient-dropped",
        LOOP,
        "dlosses * (1 + 2 * options.z_loss * lse) if options.z_loss else dlosses",
        "dlosses",
        (f"{LOSS}{REFERENCE}",),
    ),
    Mutation(
        "vocabulary-chunk-skipped",
        LOOP,
        "for first, last in vocabulary_blocks:",
        "for first, last in vocabulary_blocks[: max(1, len(vocabulary_blocks) - 1)]:",
        (f"{LOSS}{REFERENCE}",),
    ),
    Mutation("weight-gradient-not-summed", LOOP, "add=block in self._begun)", "add=False)", (f"{LOSS}{REFERENCE}",)),
    Mutation("softcap-slope-dropped", LOSS_STEPS, "logits.mul_(slope)", "pass", (f"{LOSS}{REFERENCE}",)),
    # What `local` does while messages travel, and hands to `finish`.
    Mutation(
        "local-states-from-nothing",
        CHUNKS,
        "self._states = self._carried_states(initial_state)",
        "self._states = self._carried_states(None)",
        (OF_TOKENS,),
    ),
    Mutation(
        "local-states-of-the-delta-rule-from-nothing",
        ERASING,
        "entering, carried = self._inputs.by_segment(initial_state), None",
        "entering, carried = None, None",
        (OF_DELTA,),
    ),
    Mutation(
        "slots-queries-gradient-without-what-entered",
        SLOT_PASSES,
        "self._dq, _ = self._outputs.finish(initial, return_state=False)",
        "self._dq, _ = self._outputs.finish(None, return_state=False)",
        (f"{SLOTS}{PIECES}[64-2]",),
    ),
    Mutation(
        "local-scores-of-the-tile-before",
        SLOT_SCORES,
        "work, _ = self._kept[index] = self._within(tile)",
        "work, _ = self._kept[index] = self._within(self._inputs.chunking.tiles[max(index - 1, 0)])",
        ("tests/parallel/test_linear_local.py::" + TRAVEL + "[slot]",),
    ),
)
