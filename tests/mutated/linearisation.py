"""Mutations of linearisation: what is taken of a trained run, and what matching moves."""

from tests.mutated.mutation import Mutation

TESTS = "tests/linearisation/test_matching.py::"
SOURCE, MATCHING = "longtrain/linearisation/source.py", "longtrain/linearisation/matching.py"
LOSS = f"{TESTS}test_the_loss_is_the_mean_squared_error_under_the_trained_models_inputs[gsa]"

MUTATIONS = (
    Mutation(
        "taken-weights-rounded",
        SOURCE,
        "parameter.copy_(start[name])",
        "parameter.copy_(start[name].bfloat16())",
        (f"{TESTS}test_what_softmax_has_is_taken_to_the_bit[lizard]",),
    ),
    Mutation(
        "matching-goes-on-with-its-own-outputs",
        MATCHING,
        "self._with_mlp(x + wanted)",
        "self._with_mlp(x + self.mixer(normed, shard))",
        (LOSS,),
    ),
    Mutation("matching-sums-layers", MATCHING, "torch.stack(losses).mean(0)", "torch.stack(losses).sum(0)", (LOSS,)),
    Mutation(
        "matching-moves-norms",
        MATCHING,
        "with torch.no_grad():\n            normed",
        "with torch.enable_grad():\n            normed",
        (f"{TESTS}test_matching_moves_the_new_mixers_and_nothing_else[adamw-gsa]",),
    ),
    Mutation(
        "teachers-in-checkpoints",
        "longtrain/engines/fsdp.py",
        "for name, p in named if p.requires_grad}",
        "for name, p in named}",
        (f"{TESTS}test_a_checkpoint_of_matching_is_one_of_the_model_alone",),
    ),
    Mutation(
        "one-schedule-over-both-stages",
        "longtrain/trainer.py",
        "self.step + 1 - self._first, self",
        "self.step + 1, self",
        (f"{TESTS}test_the_second_stage_has_the_schedule_of_its_own_steps",),
    ),
)
