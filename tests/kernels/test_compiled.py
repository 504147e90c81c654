"""Every kernel configuration that ships compiles for every architecture, without a card, and fits it: see `resources`.

`longtrain bench kernels --resources` writes what is found here as a table.
"""

import importlib.util
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from longtrain.bench_kernels import resources
from longtrain.bench_kernels.resources import SHARED_LIMITS, Resources, compile_operator
from longtrain.kernels import launching
from longtrain.kernels.launching import ARCHITECTURES, Config, launch, recording

CASES = [(operator, architecture) for operator in resources.operators() for architecture in ARCHITECTURES]
# These multiply matrices as large as a warp group's: on Hopper they must use its instructions.
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
            of_kernel = {name: used.tensor_cores for name, used in found.items() if name.startswith(f"{kernel}: ")}
            assert "wgmma" in of_kernel.values(), (kernel, of_kernel)


def _recorded(architecture: str, *args: object, constants: dict[str, int]) -> resources.Resources:
    from tests.kernels.example_kernel import square

    with recording(architecture) as launches:
        launch(square, (1,), *args, config=Config(constants, num_warps=4, num_stages=1))
    return resources.compile_launch(launches[0], architecture)


@needs_triton
def test_spills_and_matrix_instructions_are_seen() -> None:
    x = torch.empty(1, dtype=torch.bfloat16, device="meta")
    plain = _recorded("sm_90", x, x, 64, constants={"BLOCK": 64, "WIDTH": 64})
    assert plain.tensor_cores == "wgmma" and plain.spills == 0 and 0 < plain.registers <= 255
    large = _recorded("sm_90", x, x, 64, constants={"BLOCK": 256, "WIDTH": 256})
    assert large.spills > 0
    assert large.shared > plain.shared
    assert _recorded("gfx942", x, x, 64, constants={"BLOCK": 64, "WIDTH": 64}).tensor_cores == "mfma"
    assert _recorded("gfx942", x, x, 64, constants={"BLOCK": 256, "WIDTH": 256}).spills > 0
    single = torch.empty(1, device="meta")
    assert _recorded("sm_90", single, single, 64, constants={"BLOCK": 32, "WIDTH": 16}).tensor_cores == "none"


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
