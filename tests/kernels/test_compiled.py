"""Every kernel configuration that ships compiles for every architecture, without a card, and fits it: see `resources`.

`longtrain bench kernels --resources` writes what is found here as a table.
"""

import importlib.util
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from longtrain.bench_kernels import resources
from longtrain.bench_kernels.resources import SHARED_LIMITS, Resources, compile_operator
from longtrain.kernels import launching
from longtrain.kernels.launching import ARCHITECTURES, Config, launch, recording

CASES = [(operator, architecture) for operator in resources.operators() for architecture in ARCHITECTURES]
# These multiply matrices as large as a warp group's: on Hopper every variant in half precision must use its
# instructions, but for those named in NOT_ON_WARP_GROUPS. (IEEE products of float32 have no tensor cores to run on.)
ON_WARP_GROUPS: dict[str, tuple[str, ...]] = {
    "causal_conv1d": (),
    "gated_delta_rule": (
        "pairs_kernel",
        "apply_kernel",
        "states_kernel",
        "outputs_kernel",
        "dvalues_kernel",
        "dstates_kernel",
        "pair_gradients_kernel",
        "input_gradients_kernel",
        "channel_gradients_kernel",
    ),
    "gated_slot_attention": ("add_within",),
    "linear_attention": ("part_states", "sweep", "sweep_keys_values"),
    "linear_cross_entropy": (),  # its products are torch's
    "softmax_attention": ("forward_kernel", "dq_kernel", "dkdv_kernel"),
}
# By operator: a pattern for "kernel: call", and why no product of these is as large as a warp group's.
NOT_ON_WARP_GROUPS: dict[str, dict[str, str]] = {
    "gated_delta_rule": {},
    "gated_slot_attention": {r"add_within: float16.*": "float16 goes by chunks of 16 tokens; a warp group takes 64"},
    "linear_attention": {},
    # 32 keys, since 64 spill: see the softmax kernels' configurations.
    "softmax_attention": {r"dkdv_kernel: backward .* (256|K 192 V 128).*": "32 keys a block; a warp group takes 64"},
}

Compiled = dict[tuple[str, str], "Future[dict[str, Resources]]"]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """All compilations, in two processes of their own."""
    full = bool(request.config.getoption("--full"))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield {case: pool.submit(compile_operator, *case, full=full) for case in CASES}
        pool.shutdown(cancel_futures=True)


@needs_triton
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_what_ships_compiles_and_fits(case: tuple[str, str], compiled: Compiled) -> None:
    operator, architecture = case
    found = compiled[case].result()
    assert found
    assert not {name: used for name, used in found.items() if used.spills}
    assert not {name: used for name, used in found.items() if used.shared > SHARED_LIMITS[architecture]}
    if architecture == "sm_90":
        for kernel in ON_WARP_GROUPS[operator]:
            variants = {name: used for name, used in found.items() if name.startswith(f"{kernel}: ") and used.halves}
            assert variants, (kernel, list(found))
            assert not not_on_warp_groups(operator, variants), (operator, kernel)


def not_on_warp_groups(operator: str, variants: dict[str, Resources]) -> list[str]:
    """What of `variants` lacks a warp group's instructions and is not excused, or has them and is."""
    excused = {name for name in variants for pattern in NOT_ON_WARP_GROUPS[operator] if re.fullmatch(pattern, name)}
    return [name for name, used in variants.items() if (used.tensor_cores == "wgmma") == (name in excused)]


def _recorded(architecture: str, *args: object, constants: dict[str, int]) -> resources.Resources:
    from tests.kernels.example_kernel import square

    with recording(architecture) as launches:
        launch(square, (1,), *args, config=Config(constants, num_warps=4, num_stages=1))
    return resources.compile_launch(launches[0], architecture)


@needs_triton
def test_spills_and_matrix_instructions_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, dtype=torch.bfloat16, device="meta")
    plain = _recorded("sm_90", x, x, 64, constants={"BLOCK": 64, "WIDTH": 64})
    assert plain.tensor_cores == "wgmma" and plain.spills == 0 and 0 < plain.registers <= 255
    large = _recorded("sm_90", x, x, 64, constants={"BLOCK": 256, "WIDTH": 256})
    assert large.spills > 0
    assert large.shared > plain.shared
    assert _recorded("gfx942", x, x, 64, constants={"BLOCK": 64, "WIDTH": 64}).tensor_cores == "mfma"
    assert _recorded("gfx942", x, x, 64, constants={"BLOCK": 256, "WIDTH": 256}).spills > 0
    single = torch.empty(1, device="meta")
    without = _recorded("sm_90", single, single, 64, constants={"BLOCK": 32, "WIDTH": 16})
    assert without.tensor_cores == "none" and not without.halves and plain.halves
    found = {"square: plain": plain, "square: small": replace(without, halves=True)}
    assert not_on_warp_groups("softmax_attention", found) == ["square: small"]
    monkeypatch.setitem(NOT_ON_WARP_GROUPS, "softmax_attention", {"square: .*": "of one half"})
    assert not_on_warp_groups("softmax_attention", found) == ["square: plain"]


@needs_triton
def test_a_recorded_launch_runs_nothing_and_knows_its_architecture() -> None:
    from tests.kernels.example_kernel import square

    x = torch.empty(4, device="meta")
    with recording("sm_80") as launches:
        assert launching.architecture(x.device) == "sm_80"
        assert launching.refusal(x.device) is None
        launch(square, (0,), x, x, 4, config=Config({"BLOCK": 16}, num_warps=8, num_stages=2), WIDTH=16)
    assert [(one.grid, one.num_warps, dict(one.constants)) for one in launches] == [
        ((0,), 8, {"BLOCK": 16, "WIDTH": 16})
    ]
    assert "do not run on meta" in str(launching.refusal(x.device))
    with pytest.raises(ValueError, match="architecture: got 'sm_75', expected one of sm_80"):
        with recording("sm_75"):
            pass
