"""Mutations of what engines do with losses, gradients, weights and checkpoints."""

from tests.mutated.mutation import Mutation

FSDP, DEEPSPEED, CONFIG = (f"longtrain/engines/{name}.py" for name in ("fsdp", "deepspeed", "deepspeed_config"))
SUMS = "tests/engines/test_fsdp.py::test_consecutive_ranks_share_a_copy_and_gradients_are_sums_over_all"
STEPS = "tests/engines/test_deepspeed.py::test_steps_are_those_of_fsdp[{}]"
RESUMES = "tests/engines/test_deepspeed.py::test_each_engine_resumes_the_others_checkpoints[saves2-resumes2-adamw]"
UNROUNDED = "tests/engines/test_deepspeed.py::test_weights_are_kept_unrounded_in_float32[zero3]"
ACCUMULATED = "tests/test_training.py::test_gradients_are_the_same[2-1-contiguous-2-none-False]"
CONTRADICTS = "tests/engines/test_deepspeed.py::test_a_file_that_contradicts_the_recipe_is_refused_with_both_keys"

BEGUN = "tests/test_initialisation.py::"

MUTATIONS = (
    Mutation(
        "blocks-whole-on-every-rank-while-made",
        FSDP,
        "        for block in setup.blocks:\n            give_memory(",
        "        give_memory(setup.model, setup.mesh)\n        for block in setup.blocks:\n            give_memory(",
        (f"{BEGUN}test_no_rank_holds_the_whole_model",),
    ),
    Mutation(
        "weights-drawn-in-another-order",
        "longtrain/initialisation.py",
        "for name, shape, std in order if weights else ():",
        "for name, shape, std in order[::-1] if weights else ():",
        (f"{BEGUN}test_every_mixer_begins_as_when_it_is_made_whole",),
    ),
    Mutation(
        "fsdp-averages-over-ranks",
        FSDP,
        "(loss * (self._world / valid).to(loss.dtype)).backward()",
        "(loss * (1 / valid).to(loss.dtype)).backward()",
        (SUMS,),
    ),
    Mutation(
        "zero-averages-over-ranks",
        DEEPSPEED,
        "(self._world / valid).to(loss.dtype), scale_wrt_gas",
        "(1 / valid).to(loss.dtype), scale_wrt_gas",
        (STEPS.format("zero2-adamw"),),
    ),
    Mutation(
        "gradients-summed-with-the-first-micro-batch",
        "longtrain/trainer.py",
        "last=number == len(micro_batches)",
        "last=number == 1",
        (ACCUMULATED,),
    ),
    Mutation(
        "zero-3-part-begins-elsewhere",
        DEEPSPEED,
        "start = min(size * self._mesh.get_local_rank(), numbers)",
        "start = 0",
        (STEPS.format("zero3-muon"),),
    ),
    Mutation(
        "all-groups-stepped-for-each",
        "longtrain/optimizer.py",
        "[group for group in groups if any(group is asked for asked in self.param_groups)]",
        "list(groups)",
        (STEPS.format("zero2:cpu-muon"),),
    ),
    Mutation(
        "float32-weights-from-rounded-ones",
        DEEPSPEED,
        'rounded, hollow = setup.precision != "float32", self.stage == 3',
        "rounded, hollow = False, self.stage == 3",
        (UNROUNDED,),
    ),
    Mutation(
        "optimizer-state-not-resumed",
        DEEPSPEED,
        "                    self._write(place.within(value), name, read)\n",
        "                    pass\n",
        (RESUMES,),
    ),
    Mutation(
        "gradients-whole-until-the-last-micro-batch",
        "longtrain/engines/fsdp.py",
        "self._sharded.set_requires_all_reduce(last)",
        "self._sharded.set_requires_gradient_sync(last)",
        ("tests/engines/test_fsdp.py::test_gradients_of_every_micro_batch_are_cut_at_once[1]",),
    ),
    Mutation(
        "contradictions-taken",
        CONFIG,
        "if key in sources and value != wanted:",
        "if False:",
        (CONTRADICTS,),
    ),
)
