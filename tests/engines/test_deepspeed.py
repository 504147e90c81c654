"""The deepspeed engine beside fsdp over several steps: optimizers, clipping, schedule, precision, checkpoints."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from longtrain import checkpoint
from longtrain.config import compose
from longtrain.engines import DeepSpeedConfig, DeepSpeedEngine, Setup, Wanted
from longtrain.engines.deepspeed_config import deepspeed_json, fit_buffers, own_buffers
from longtrain.errors import UsageError
from longtrain.optimizer import OptimizerConfig
from longtrain.parallel import build_mesh
from longtrain.trainer import TrainerConfig
from tests.distributed import run_command, run_distributed
from tests.engines.cases import small_model, trainer_of, weights_of
from tests.test_refusals import LONGTRAIN, SMALL

STEPS = 4
# eps as large as gradients are here: where one is all rounding, Adam would make a whole step of it.
OPTIMIZERS = {
    "adamw": OptimizerConfig(name="adamw", learning_rate=0.01, eps=1e-3),
    "muon": OptimizerConfig(name="muon", learning_rate=0.01, matrix_learning_rate=0.01, eps=1e-3),
    "sgd": OptimizerConfig(name="sgd", learning_rate=0.1),
}


def trajectory(
    rank: int, world: int, engine: str, optimizer: str, precision: str, resume: Path | None, save: Path | None
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and norms of steps whose gradients are clipped and whose rate moves, and the weights after them.

    save: where the checkpoint after the second step goes; resume: where to go on from, to the last step.
    """
    config = TrainerConfig(steps=STEPS, sequences=2, clip=0.5, precision=precision)
    trainer = trainer_of(
        world, engine, accumulation=2 // world, data=world, optimizer=OPTIMIZERS[optimizer], config=config
    )
    trainer.schedule = replace(trainer.schedule, warmup=3)
    if resume is not None:
        tensors = trainer.tensors()
        trainer.restore(checkpoint.load(resume, into=tensors))
        trainer.loaded(tensors)
    losses, norms = [], []
    while trainer.step < STEPS:
        result = trainer.train_step()
        losses.append(result.loss)
        norms.append(result.gradient_norm)
        if trainer.step == 2 and save is not None:
            checkpoint.save(save, tensors=trainer.tensors(), numbers=trainer.numbers())
    weights = weights_of(trainer)
    trainer.close()
    return losses, norms, weights


def assert_same(found: tuple, wanted: tuple, *, close: float = 1e-5) -> None:
    steps = len(found[0])
    for found_numbers, wanted_numbers in zip(found[:2], wanted[:2], strict=True):
        np.testing.assert_allclose(found_numbers, wanted_numbers[-steps:], rtol=close)
    assert found[2].keys() == wanted[2].keys()
    for name, weight in wanted[2].items():
        assert (found[2][name] - weight).norm() <= close * 10 * weight.norm(), name


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [
        ("zero0", "muon"),
        ("zero1", "muon"),
        ("zero2", "adamw"),
        ("zero3", "muon"),
        ("zero2:cpu", "muon"),
        ("zero3:cpu", "adamw"),
    ],
)
def test_steps_are_those_of_fsdp(engine: str, optimizer: str) -> None:
    wanted = run_distributed(2, trajectory, "fsdp", optimizer, "float32", None, None)[0]
    assert min(wanted[1]) > 0.5, "the test is to see gradients clipped"
    for found in run_distributed(2, trajectory, engine, optimizer, "float32", None, None):
        assert_same(found, wanted)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_bfloat16_follows_fsdp(engine: str) -> None:
    wanted = run_distributed(2, trajectory, "fsdp", "adamw", "bfloat16", None, None)[0]
    for found in run_distributed(2, trajectory, engine, "adamw", "bfloat16", None, None):
        assert_same(found, wanted, close=2**-7)  # each product is rounded to 2^-9


def first_weights(rank: int, world: int, engine: str) -> bool:
    config = TrainerConfig(steps=1, sequences=2, precision="bfloat16")
    trainer = trainer_of(world, engine, config=config)
    trainer.evaluate(trainer.data, 1)  # gathers weights
    exact, found = dict(small_model().named_parameters()), weights_of(trainer)
    return found.keys() == exact.keys() and all(torch.equal(found[name], exact[name]) for name in exact)


@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero2", "zero3"])
def test_weights_are_kept_unrounded_in_float32(engine: str) -> None:
    assert run_distributed(2, first_weights, engine) == [True, True]


@pytest.mark.parametrize(
    ("saves", "resumes", "optimizer"),
    [
        ((2, "zero2"), (1, "fsdp"), "muon"),
        ((2, "fsdp"), (1, "zero3"), "muon"),
        ((1, "zero3"), (2, "zero1"), "adamw"),
        ((2, "zero0"), (2, "zero3"), "muon"),
    ],
)
def test_each_engine_resumes_the_others_checkpoints(
    tmp_path: Path, saves: tuple[int, str], resumes: tuple[int, str], optimizer: str
) -> None:
    folder = tmp_path / "step-00000002"
    wanted = run_distributed(saves[0], trajectory, saves[1], optimizer, "float32", None, folder)[0]
    for found in run_distributed(resumes[0], trajectory, resumes[1], optimizer, "float32", folder, None):
        assert len(found[0]) == STEPS - 2
        assert_same(found, wanted)


def test_the_command_trains_and_resumes_with_it(tmp_path: Path) -> None:
    words = ["quickstart", *SMALL, "run_dir=run", "engine=deepspeed", "deepspeed.stage=2", "launch.device=cpu"]
    ended = run_command([*LONGTRAIN, "train", *words], cwd=tmp_path, timeout=240, env={"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(step["loss"]) and step["gradient_norm"] > 0 for step in steps)
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.full
def test_the_recipe_of_zero_3_with_offload_trains_in_small(tmp_path: Path) -> None:
    """Its shape, engine, precision and memory keys, in small: the recipe's own size needs a node of cards."""
    small = ["model.width=64", "model.depth=2", "model.mlp_width=96", "model.vocabulary=512", "data.length=256"]
    mixers = "layers.mixers={softmax: {heads: 8, kv_heads: 4}}"
    words = ["llama_8b_zero3", *small, mixers, "memory.tile=32", "trainer.steps=4", "run_dir=run"]
    words += ["launch.processes=2", "launch.device=cpu", "trainer.evaluate_sequences=2"]
    ended = run_command([*LONGTRAIN, "train", *words], cwd=tmp_path, timeout=480, env={"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(np.isfinite(step["loss"]) and step["gradient_norm"] > 0 for step in steps)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine=deepspede"], "engine: got 'deepspede' (nearest: 'deepspeed'), expected one of fsdp, deepspeed"),
        (["engine=deepspeed", "deepspeed.stage=4"], "deepspeed.stage: got 4, expected 0, 1, 2 or 3"),
        (["engine=deepspeed", "deepspeed.offload_optimizer=nvme"], "deepspeed.offload_optimizer: got 'nvme'"),
        (
            ["engine=deepspeed", "deepspeed.offload_optimizer=cpu", "deepspeed.stage=0"],
            "deepspeed.offload_optimizer: got 'cpu' with deepspeed.stage=0",
        ),
        (
            ["engine=deepspeed", "deepspeed.stage=0", "trainer.precision=bfloat16"],
            "deepspeed.stage: got 0 with trainer.precision=bfloat16",
        ),
        (["engine=deepspeed", "fsdp.cpu_offload=true"], "fsdp.cpu_offload: got True with engine=deepspeed"),
        (
            ["deepspeed.stage=2"],
            "deepspeed.stage: got 2 with engine=fsdp, which does not read it; engine=deepspeed would",
        ),
        (["engine=deepspeed", "deepspeed.config=no.json"], "deepspeed.config: no.json cannot be read"),
    ],
)
def test_refusals(overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        compose("quickstart", overrides)
    assert str(refused.value).startswith(said), str(refused.value)


def merged(tmp_path: Path, given: object, **changed: object) -> dict:
    path = tmp_path / "ds.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    wanted = Wanted(**{"precision": "float32", "clip": 1.0, "accumulation": 2} | changed)  # type: ignore[arg-type]
    return deepspeed_json(DeepSpeedConfig(stage=2, config=str(path)), wanted)


def refused_by_deepspeed(rank: int, world: int, file: str) -> str:
    setup = Setup(
        model=torch.nn.Linear(3, 8),
        blocks=(),
        mesh=build_mesh("cpu", data=1, sequence=world),
        precision="float32",
        optimizer=OptimizerConfig(name="sgd", weight_decay=0.0),
        clip=1.0,
    )
    with pytest.raises(UsageError) as refused:
        DeepSpeedEngine(setup, DeepSpeedConfig(stage=2, config=file))
    return str(refused.value)


def test_what_deepspeed_refuses_of_a_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"tensorboard": {"enabled": "perhaps"}}')
    (said,) = run_distributed(1, refused_by_deepspeed, str(path))
    assert said.startswith("deepspeed.config: DeepSpeed refuses tensorboard.enabled of DeepSpeedMonitorConfig: ")


def test_a_file_of_the_users_is_merged_in(tmp_path: Path) -> None:
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": "auto",
            "overlap_comm": True,
            "reduce_bucket_size": "50000000",
            "contiguous_gradients": True,
            "offload_param": {"device": "none"},
            "zero_quantized_weights": False,
        },
        "wall_clock_breakdown": True,
    }
    made = merged(tmp_path, given)
    zero = made["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"]) == (2, True, 50_000_000)
    assert own_buffers(DeepSpeedConfig(config=str(tmp_path / "ds.json"))) == ["overlap_comm", "reduce_bucket_size"]
    assert made["wall_clock_breakdown"] is True and made["gradient_accumulation_steps"] == 2
    assert "train_batch_size" not in made and made["gradient_clipping"] == 1.0
    assert merged(tmp_path, {}, clip=float("inf"))["gradient_clipping"] == 0.0


def test_buffers_go_by_blocks_unless_the_users_file_says_otherwise() -> None:
    blocks, outside = [[200_000_000, 50_000], [150_000_000, 50_000]], [500_000_000, 4_000]
    fit_buffers(sizes := {"stage": 3}, blocks, outside)
    assert sizes["reduce_bucket_size"] == 200_050_000 and sizes["stage3_max_reuse_distance"] == 0
    assert sizes["stage3_prefetch_bucket_size"] == 200_000_000  # small weights are whole anyway
    assert sizes["stage3_max_live_parameters"] == 500_000_000 + 2 * 200_000_000
    given = {"stage": 3, "reduce_bucket_size": 7, "stage3_max_live_parameters": 8}
    fit_buffers(given, blocks, outside)
    assert (given["reduce_bucket_size"], given["stage3_max_live_parameters"]) == (7, 8)
    fit_buffers(few := {"stage": 2}, [[60, 40]], [10])
    assert few == {"stage": 2, "reduce_bucket_size": 110}  # all in one message


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ({"gradient_clipping": 0.5}, ("gradient_clipping = 0.5", "trainer.clip makes it 1.0")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled = true", "trainer.precision")),
        ({"torch_autocast": {"enabled": True}}, ("torch_autocast.enabled = true", "trainer.precision makes it false")),
        ({"zero_optimization": {"cpu_offload": True}}, ("cpu_offload = true", "deepspeed.offload_optimizer")),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, ('offload_optimizer = "cpu", expected an object',)),
        ({"zero_optimization": 3}, ("zero_optimization = 3, expected an object",)),
        ({"zero_optimization": {"stage": 3}}, ("zero_optimization.stage = 3", "deepspeed.stage makes it 2")),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            ("zero_optimization.offload_optimizer.device", "deepspeed.offload_optimizer"),
        ),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ("offload_param.device", "fsdp.cpu_offload")),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, ("zero_quantized_gradients", "float32")),
        ({"zero_optimization": {"contiguous_gradients": False}}, ("contiguous_gradients = false", "one buffer")),
        ({"zero_optimization": {"reduce_bucket_size": "x"}}, ("zero_optimization.reduce_bucket_size", "integer")),
        ({"zero_optimization": {"reduce_bucket_size": -5}}, ("zero_optimization.reduce_bucket_size", "greater than 0")),
        ({"zero_optimization": {"stage3_max_live_parameters": None}}, ("stage3_max_live_parameters", "integer")),
        (
            {"zero_optimization": {"reduce_bucket": 1}},
            ("zero_optimization.reduce_bucket (nearest: 'reduce_bucket_size'",),
        ),
        ({"zero_optimisation": {"stage": 2}}, ("zero_optimisation (nearest: 'zero_optimization')", "no use for")),
        ({"gradient_predivide_factor": 2.0}, ("gradient_predivide_factor", "divided before")),
        ({"gradient_accumulation_steps": 1}, ("gradient_accumulation_steps = 1", "trainer.accumulation makes it 2")),
        ({"optimizer": {"type": "Adam"}}, ("optimizer", "optimizer.name")),
        ({"train_batch_size": 8}, ("train_batch_size", "trainer.sequences")),
        ({"sequence_parallel_size": 2}, ("sequence_parallel_size", "parallel.sequence")),
        ({"zero_allow_untested_optimizer": False}, ("zero_allow_untested_optimizer", "engine=deepspeed needs")),
        ("[1]", ("holds no object",)),
        ("{", ("is no JSON",)),
    ],
)
def test_a_file_that_contradicts_the_recipe_is_refused_with_both_keys(
    tmp_path: Path, given: object, keys: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as refused:
        merged(tmp_path, given)
    assert all(key in str(refused.value) for key in keys), str(refused.value)
