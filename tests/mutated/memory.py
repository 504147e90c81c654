"""Mutations of what is kept for backward and what is computed again."""

from tests.mutated.mutation import Mutation

POLICIES = "tests/memory/test_policies.py::"
RECOMPUTE = "tests/memory/test_recompute.py::"
SAME = RECOMPUTE + "test_every_policy_has_the_same_gradients_and_attention_repeats_no_message"
RECURRENT = RECOMPUTE + "test_backward_of_recurrent_mixers_sends_the_same_with_all_kept_and_with_attention"
CONVOLUTION = "tests/parallel/test_conv1d.py::test_kept_convolutions_are_not_computed_again"

RUNS, READS, NAMES = "longtrain/memory/recompute.py", "longtrain/memory/policies.py", "longtrain/memory/operators.py"

MUTATIONS = (
    Mutation("kept-results-computed-again", RUNS, "if operator is None:", "if True:", (RECURRENT,)),
    Mutation("results-given-back-in-the-wrong-order", RUNS, ".popleft()", ".pop()", (SAME,)),
    Mutation("scans-not-kept", NAMES, '"linear_attention", "delta_rule", ', '"linear_attention", ', (RECURRENT,)),
    Mutation(
        "halo-not-held", "parallel/conv1d.py", "keep=gradients and not torch.", "keep=False and torch.", (CONVOLUTION,)
    ),  # fmt: skip
    Mutation(
        "default-policy-ignored",
        READS,
        "policies.get(DEFAULT, Policy(recompute=False))",
        "Policy(recompute=False)",
        (POLICIES + "test_a_mapping_says_it_for_each_mixer",),
    ),
)
