"""Mutations of what is kept for backward and what is computed again."""

from tests.mutated.mutation import Mutation

POLICIES = "tests/memory/test_policies.py::"
RECOMPUTE = "tests/memory/test_recompute.py::"
SAME = RECOMPUTE + "test_every_policy_has_the_same_gradients_and_attention_repeats_no_message"
RECURRENT = RECOMPUTE + "test_backward_of_recurrent_mixers_sends_the_same_with_all_kept_and_with_attention"
CONVOLUTION = "tests/parallel/test_conv1d.py::test_kept_convolutions_are_not_computed_again"

RUNS, READS, NAMES = "longtrain/memory/recompute.py", "longtrain/memory/policies.py", "longtrain/memory/operators.py"

TILES, ACTIVATIONS = "tests/memory/test_tiles.py::", "tests/memory/test_activations.py::"
TILED = "tests/kernels/test_tiled_mlp.py::"
MLP, NORM, MODEL = "kernels/tiled_mlp/torch_impl.py", "kernels/rms_norm/torch_impl.py", "longtrain/model.py"

PUTS = "longtrain/memory/offload.py"
AHEAD = "tests/memory/test_offload.py::test_copies_come_back_ahead_of_their_use_and_few_layers_are_under_way"

MUTATIONS = (
    Mutation(
        "recompute-hands-on-parts-of-what-is-larger",
        RUNS,
        "tuple(z.contiguous() for z in result)",
        "tuple(result)",
        (RECOMPUTE + "test_what_a_block_hands_on_holds_nothing_else",),
    ),
    Mutation(
        "tiles-lose-the-residuals-gradient",
        MLP,
        "torch.add(part, dy[rows], out=dx[rows])",
        "dx[rows] = part",
        (TILED + "test_torch_is_the_reference[dtype0-4]",),
    ),  # fmt: skip
    Mutation(
        "weights-of-the-last-tile-alone",
        MLP,
        "multiply(a, b, total, add=True)",
        "multiply(a, b, total)",
        (TILED + "test_torch_is_the_reference[dtype0-4]",),
    ),  # fmt: skip
    Mutation(
        "tiles-summed-in-half-precision",
        MLP,
        "torch.zeros_like(weight, dtype=wide)",
        "torch.zeros_like(weight)",
        (TILED + "test_sums_over_many_tiles_lose_nothing_in_half_precision",),
    ),  # fmt: skip
    Mutation(
        "tiles-run-again-in-recompute",
        RUNS,
        "(*policy.kept, LAST) if tiled else policy.kept",
        "policy.kept",
        (TILES + "test_recompute_does_not_run_the_tiles_again",),
    ),  # fmt: skip
    Mutation(
        "norm-without-its-mean",
        NORM,
        "(gradient - normal.mul_(along))",
        "(gradient - 0 * normal.mul_(along))",
        ("tests/kernels/test_position_wise.py::test_torch_is_the_reference",),
    ),  # fmt: skip
    Mutation(
        "rotated-further-in-backward",
        "kernels/rotary/operators.py",
        "inverse=not ctx.options",
        "inverse=ctx.options",
        ("tests/kernels/test_position_wise.py::test_torch_is_the_reference",),
    ),  # fmt: skip
    Mutation(
        "attention-runs-a-layer-without-recompute",
        READS,
        "kept=tuple(DISTRIBUTED.values()))",
        "kept=tuple(DISTRIBUTED.values())) and Policy(recompute=False)",
        (ACTIVATIONS + "test_under_attention_a_layer_keeps_its_input_and_out_and_lse",),
    ),  # fmt: skip
    Mutation(
        "logits-whole",
        MODEL,
        'linear_cross_entropy(x, weight, labels, reduction="none")',
        'nn.functional.cross_entropy(self.head(x)[0], labels[0], reduction="none")[None]',
        (ACTIVATIONS + "test_the_logits_are_never_whole",),
    ),  # fmt: skip
    Mutation(
        "layers-come-back-only-when-asked-for",
        PUTS,
        "max(away.layer - self._in_flight, 0) - 1",
        "away.layer - 1",
        (AHEAD,),
    ),
    Mutation("forward-waits-for-no-copy", PUTS, "if len(self._leaving) >= self._in_flight:", "if False:", (AHEAD,)),
    Mutation("kept-results-computed-again", RUNS, "if operator is None:", "if True:", (RECURRENT,)),
    Mutation("results-given-back-in-the-wrong-order", RUNS, ".popleft()", ".pop()", (SAME,)),
    Mutation("scans-not-kept", NAMES, '"linear_attention", "delta_rule", ', '"linear_attention", ', (RECURRENT,)),
    Mutation(
        "halo-not-held", "parallel/conv1d.py", "keep=gradients and not torch.", "keep=False and torch.", (CONVOLUTION,)
    ),  # fmt: skip
    Mutation(
        "kept-results-written-to",
        RUNS,
        "if self._shared and func._schema.is_mutable:",
        "if False:",
        (
            RECOMPUTE + "test_what_a_block_writes_to_is_kept_as_it_was[False]",
            RECOMPUTE + "test_operators_of_torch_whose_results_are_written_to_can_be_kept",
        ),
    ),
    Mutation(
        "copies-not-waited-for-before-writing",
        RUNS,
        "self._store.settle()",
        "pass",
        (RECOMPUTE + "test_what_a_block_writes_to_is_kept_as_it_was[True]",),
    ),
    Mutation(
        "operators-nobody-runs-taken",
        READS,
        "if operator.name not in seen:",
        "if False:",
        (RECOMPUTE + "test_operators_that_no_layer_runs_are_refused",),
    ),
    Mutation(
        "default-policy-ignored",
        READS,
        "policies.get(DEFAULT, Policy(recompute=False))",
        "Policy(recompute=False)",
        (POLICIES + "test_a_mapping_says_it_for_each_mixer",),
    ),
)
