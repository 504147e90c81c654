"""Mutations of dry runs and of plans."""

from tests.mutated.mutation import Mutation

MODES, TRACKER = "longtrain/dry_run/modes.py", "longtrain/dry_run/tracker.py"
HOLDING, DOCUMENTS, PLANNER = (f"longtrain/planning/{name}.py" for name in ("holding", "documents", "planner"))
TERMS, MIXING, LAUNCHING = "longtrain/planning/terms.py", "longtrain/planning/mixing.py", "kernels/launching.py"
DRY, PLANS = "tests/dry_run/test_modes.py::", "tests/planning/test_planner.py::"
AGAINST = "tests/planning/test_against_dry_runs.py::test_plans_are_what_dry_runs_hold"

MUTATIONS = (
    Mutation(
        "dry-run-leaves-operators-closed",
        MODES,
        'if func.namespace == "longtrain":',
        'if func.namespace == "nobody":',
        (f"{DRY}test_bodies_of_registered_operators_are_seen",),
    ),
    Mutation(
        "dry-run-fakes-host-data",
        MODES,
        "return self._preparing or (self._device.type",
        "return (self._device.type",
        (f"{DRY}test_fake_numbers_are_fine_and_host_data_is_real",),
    ),
    Mutation(
        "dry-run-overlooks-what-is-resized",
        TRACKER,
        "            self._track_resize()\n",
        "",
        (f"{DRY}test_every_storage_counts_until_it_is_gone",),
    ),
    Mutation(
        "plan-of-half-the-weights",
        HOLDING,
        """        if self.here:
            add("weights", 4 * shape.weights * self.share)
            add("optimizer", states(shape) * shape.weights * self.share)
        add(""",
        """        if self.here:
            add("weights", 2 * shape.weights * self.share)
            add("optimizer", states(shape) * shape.weights * self.share)
        add(""",
        (f"{PLANS}test_weights_and_work_are_counted",),
    ),
    Mutation(
        "plan-forgets-what-scans-hold-inside",
        TERMS,
        'moment.add("ring buffers", shape.tokens * mixer.ring)',
        'moment.add("ring buffers", 0.0)',
        (f"{AGAINST}[hybrid_1b_4m-8xh200-overrides0]",),
    ),
    Mutation(
        "plan-keeps-the-input-of-every-mixer",
        MIXING,
        "or layer.options.pamm is not None:",
        "or layer.options.pamm == 0:",
        (f"{PLANS}test_attention_that_keeps_few_rows_keeps_no_input",),
    ),
    Mutation(
        "dry-run-leaves-out-the-last-tile",
        LAUNCHING,
        "[*blocks[:first], blocks[-1]] if",
        "blocks[:first] if",
        (f"{DRY}test_tiles_that_repeat_are_left_out_on_pretended_cards",),
    ),
    Mutation(
        "dry-run-of-a-ring-without-its-third-step",
        "parallel/attention/ring.py",
        "launching.visited(steps, device, first=3)",
        "launching.visited(steps, device)",
        (f"{DRY}test_steps_of_a_ring_that_repeat_are_left_out_on_pretended_cards",),
    ),
    Mutation(
        "plan-of-one-long-document",
        DOCUMENTS,
        "np.arange(_sequences(recipe, devices) + 1, dtype=np.int64) * recipe.data.length",
        "np.array([0, _sequences(recipe, devices)], dtype=np.int64) * recipe.data.length",
        (f"{PLANS}test_more_sequences_are_documents_of_their_own",),
    ),
    Mutation(
        "plan-looks-at-the-lowest-layer-only",
        TERMS,
        "first, last = index <= _near(shape),",
        "first, last = index <= 0,",
        (f"{PLANS}test_no_layer_is_fuller_than_those_that_a_plan_looks_at",),
    ),
    Mutation(
        "plan-of-8-bit-adam-in-float32",
        HOLDING,
        'adam = 8.0 if optimizer.adam == "fused" else',
        'adam = 8.0 if optimizer.adam != "none" else',
        (f"{PLANS}test_adam_of_8_bits_takes_a_quarter",),
    ),
    Mutation(
        "plan-of-a-list-without-its-operators",
        MIXING,
        '"recompute": sizes.policy(index) if blocks else',
        '"recompute": ["attention"] if blocks else',
        (f"{PLANS}test_lists_of_operators_are_tried_with_the_whole_block",),
    ),
    Mutation(
        "plan-tries-mixers-as-if-they-kept-all",
        MIXING,
        "else _policy(sizes, index),",
        'else "none",',
        (f"{PLANS}test_of_convolutions_the_policy_attention_keeps_next_to_nothing",),
    ),
    Mutation(
        "plan-leaves-out-what-does-not-grow",
        MIXING,
        "along = (tokens - few[0]) / (many[0] - few[0])",
        "few, along = (0, _NOTHING), tokens / many[0]",
        (f"{PLANS}test_what_does_not_grow_with_the_tokens_counts_once",),
    ),
    Mutation(
        "plan-forgets-what-the-layer-before-hands-on",
        MIXING,
        '"held": _held_here(sizes, index),',
        '"held": False,',
        (f"{PLANS}test_keys_and_values_of_the_layer_before_are_held_once",),
    ),
    Mutation(
        "plan-counts-what-the-layer-before-hands-on-twice",
        MIXING,
        '"held": _held_here(sizes, index),',
        '"held": True,',
        (f"{PLANS}test_keys_and_values_of_the_layer_before_are_held_once",),
    ),
    Mutation(
        "plan-takes-what-auto-takes-for-one-document",
        MIXING,
        "shard, ways = sizes.first_shard, {}",
        "shard, ways = sizes.shard, {}",
        (f"{PLANS}test_what_auto_takes_goes_by_the_documents_that_there_are",),
    ),
    Mutation(
        "plan-of-whole-blocks-whatever-the-window",
        MIXING,
        " and at_home and layer.options.window is None",
        " and at_home",
        (f"{PLANS}test_over_ranks_a_window_holds_what_it_sees_of_the_others",),
    ),
    Mutation(
        "plan-of-attention-at-home-whatever-its-layout",
        MIXING,
        " and at_home and layer",
        " and layer",
        (f"{PLANS}test_attention_on_another_layout_is_no_ring_at_home",),
    ),
    Mutation(
        "plan-of-zero-without-earlier-micro-batches",
        HOLDING,
        "if stage < 2 and self._accumulates:",
        "if stage < 0:",
        (f"{PLANS}test_zero_keeps_all_gradients_from_the_second_micro_batch_on",),
    ),
    Mutation(
        "plan-of-zero-with-a-head-of-its-own",
        HOLDING,
        'add("working set", self._tied)',
        'add("working set", 0.0)',
        (f"{PLANS}test_a_tied_heads_gradient_waits_for_the_embeddings",),
    ),
    Mutation(
        "plan-copies-to-the-host-for-nothing",
        "longtrain/planning/roofline.py",
        "self.weights, self.host)",
        "self.weights)",
        (f"{PLANS}test_what_lies_on_the_host_is_copied_and_its_optimizer_steps_there",),
    ),
    Mutation(
        "plan-steps-on-the-host-at-the-devices-speed",
        "longtrain/planning/roofline.py",
        "device.bandwidth if held.here else",
        "device.bandwidth if True else",
        (f"{PLANS}test_what_lies_on_the_host_is_copied_and_its_optimizer_steps_there",),
    ),
    Mutation(
        "plan-names-changes-that-need-no-other-with-others",
        PLANNER,
        "if not any(set(one.overrides) <= set(pair.overrides) for one in found)",
        "if True",
        (f"{PLANS}test_what_would_make_a_plan_fit_is_said_fastest_first",),
    ),
    Mutation(
        "plan-of-a-ring-whatever-the-strategy",
        MIXING,
        'return not ways or (ways["strategy"] == "ring" and at_home and layer.options.window is None)',
        "return True",
        (f"{PLANS}test_strategies_that_exchange_heads_keep_them",),
    ),
    Mutation(
        "plan-of-one-ring-where-there-are-two",
        MIXING,
        "rings = 1 if sizes.recipe.parallel.rows == 1 else 2",
        "rings = 1",
        (f"{PLANS}test_an_outer_ring_has_blocks_under_way_beside_the_inner_ones",),
    ),
    Mutation(
        "zero3-keeps-blocks-for-later",
        "longtrain/engines/deepspeed_config.py",
        'zero.setdefault("stage3_max_reuse_distance", 0)',
        'zero.setdefault("stage3_max_reuse_distance", 10**9)',
        (f"{AGAINST}[llama_8b_zero3-8xh100-overrides1]",),
    ),
    Mutation(
        "dry-run-of-the-first-step-of-zero3",
        "longtrain/dry_run/step.py",
        "            trainer.train_step()  # makes",
        "            pass  # makes",
        (f"{AGAINST}[llama_8b_zero3-8xh100-overrides1]",),
    ),
    Mutation(
        "plan-names-the-slowest-change-first",
        PLANNER,
        "now.recipe.data.length, -change.plan.tokens_per_second",
        "now.recipe.data.length, change.plan.tokens_per_second",
        (f"{PLANS}test_what_would_make_a_plan_fit_is_said_fastest_first",),
    ),
)
