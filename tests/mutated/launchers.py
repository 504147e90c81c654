"""Mutations of what launchers are told."""

from tests.mutated.mutation import Mutation

TESTS = "tests/launch/test_launchers.py::test_"

MUTATIONS = (
    Mutation(
        "deepspeed-counts-devices-itself",
        "launch/deepspeed.py",
        ', f"--num_gpus={nodes.per_node}"]',
        "]",
        (f"{TESTS}deepspeed_always_gets_a_number_of_devices",),
    ),
    Mutation(
        "slots-against-processes-unseen",
        "launch/hosts.py",
        "    if launch.processes not in (None, total):\n",
        "    if False:\n",
        (f"{TESTS}refusals",),
    ),
    Mutation(
        "users-threads-overwritten",
        "launch/local.py",
        "for name, value in wanted.items() if name not in given}",
        "for name, value in wanted.items() if name}",
        (f"{TESTS}torchrun_on_one_node",),
    ),
    Mutation(
        "scaling-of-other-losses",
        "launch/benchmark_scaling.py",
        "                if not off <= allowed:\n",
        "                if False:\n",
        ("tests/launch/test_benchmark_scaling.py::test_no_number_where_losses_differ",),
    ),
    Mutation(
        "waits-not-counted",
        "longtrain/bench_training.py",
        "waited.seconds += time",
        "waited.seconds += 0 * time",
        ("tests/launch/test_benchmark_scaling.py::test_waits_are_counted_where_they_are",),
    ),
)
