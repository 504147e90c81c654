"""DeepSpeed's configuration, made from the recipe; a JSON file of the user's own is merged in unless it contradicts."""

import importlib.util
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtrain.errors import UsageError, nearest

OFFLOAD = ("none", "cpu")
_WORTH_A_MESSAGE = 50_000_000  # numbers: with fewer, the time in which messages start would count
# What a user's file may not say, because the recipe says it, or the engine could not work with it.
ELSEWHERE = {
    "optimizer": "optimizer.name and its neighbours set the optimizer",
    "scheduler": "schedule.name and its neighbours set the learning rate",
    "train_batch_size": "trainer.sequences sets the batch",
    "train_micro_batch_size_per_gpu": "trainer.sequences sets the batch",
    "sequence_parallel_size": "parallel.sequence sets it",
    "activation_checkpointing": "memory.recompute sets it",
    "tensor_parallel": "longtrain shards sequences and weights only",
    "prescale_gradients": "the loss is divided before DeepSpeed sees it",
    "gradient_predivide_factor": "the loss is divided before DeepSpeed sees it",
    "gradient_allreduce_op": "the loss is divided before DeepSpeed sees it",
    "zero_optimization.zenflow": "optimizer.name and its neighbours set the optimizer",
    "zero_optimization.mics_shard_size": "engine=fsdp with fsdp.replicas shards inside groups of ranks",
    "zero_optimization.zero_hpz_partition_size": "engine=fsdp with fsdp.replicas shards inside groups of ranks",
}
# Sections and values outside of "zero_optimization" that a user's file may have, beside those that are made.
TAKEN = (
    "fp16", "amp", "torch_autocast", "bf16", "data_types", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "aio", "checkpoint",
    "disable_python_gc", "disable_allgather", "check_overflow", "log_level", "nebula",
)  # fmt: skip


@dataclass(frozen=True)
class DeepSpeedConfig:
    """Options of the deepspeed engine."""

    stage: int = 3
    offload_optimizer: str = "none"
    config: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What else of a recipe the configuration depends on."""

    precision: str  # trainer.precision
    clip: float  # trainer.clip
    accumulation: int  # trainer.accumulation


def check_deepspeed(config: DeepSpeedConfig, wanted: Wanted) -> None:
    """Refuse what cannot work, naming the recipe's key, before any process starts."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError("engine: got 'deepspeed', which is not installed; `pip install deepspeed` would do it")
    check_options(config)
    if config.stage == 0 and config.offload_optimizer != "none":
        raise UsageError(
            f"deepspeed.offload_optimizer: got {config.offload_optimizer!r} with deepspeed.stage=0, which keeps the "
            "optimizer's state whole on every device; deepspeed.stage=1, 2 or 3 would work"
        )
    if config.stage == 0 and wanted.precision == "bfloat16":
        raise UsageError(
            "deepspeed.stage: got 0 with trainer.precision=bfloat16: DeepSpeed would sum the gradients in bfloat16 "
            "there; deepspeed.stage=1, 2 or 3 would work"
        )
    deepspeed_json(config, wanted)


def check_options(config: DeepSpeedConfig) -> None:
    """Refuse options that do not exist."""
    if config.stage not in (0, 1, 2, 3):
        raise UsageError(f"deepspeed.stage: got {config.stage}, expected 0, 1, 2 or 3")
    if config.offload_optimizer not in OFFLOAD:
        near = nearest(config.offload_optimizer, OFFLOAD)
        raise UsageError(f"deepspeed.offload_optimizer: got {config.offload_optimizer!r}{near}, expected none or cpu")


def deepspeed_json(config: DeepSpeedConfig, wanted: Wanted) -> dict[str, Any]:
    """DeepSpeed's configuration as a mapping, the user's file merged in.

    A value "auto" in the file stands for the recipe's, as in other programs.

    Raises:
        UsageError: the file cannot be read, or says something else than the recipe; both keys are named.
    """
    made = _made(config, wanted)
    if config.config is None:
        return made
    given = _read(Path(config.config))
    _merge(made, given, _sources(), config.config, "")
    if "zero_optimization" in given:
        made["zero_optimization"] = _as_deepspeed_reads(made["zero_optimization"], config.config)
    return made


def own_buffers(config: DeepSpeedConfig) -> list[str]:
    """Keys of "zero_optimization" that the user's file sets as it likes."""
    given = {} if config.config is None else _read(Path(config.config)).get("zero_optimization", {})
    sources = [f"{key}." for key in _sources()]
    return sorted(key for key in given if not any(known.startswith(f"zero_optimization.{key}.") for known in sources))


def fit_buffers(zero: dict[str, Any], blocks: Sequence[Sequence[int]], outside: Sequence[int]) -> None:
    """Sizes, in numbers, that follow from the model where the user's file doesn't set them.

    DeepSpeed would sum up half a billion gradients at once. Its stage 3 would keep what runs again within a billion
    numbers, and gather ahead until a billion are whole. Here both go by blocks, as with fsdp: one's gradients at once,
    one ahead. To gather the last few blocks once more costs next to nothing on a long sequence.

    zero: the section "zero_optimization", which is written to. blocks: numbers of each block's weights. outside: of all
    other weights.
    """
    weights, whole = sum(map(sum, [*blocks, outside])), max(map(sum, blocks), default=0)
    zero.setdefault("reduce_bucket_size", max(min(weights, max(whole, _WORTH_A_MESSAGE)), 1))
    if zero["stage"] == 3:
        # Small weights are never cut. What is gathered at once is freed as one: a block's, and nothing of the next one.
        small = zero.setdefault("stage3_param_persistence_threshold", 100_000)
        *cut, always = [sum(number for number in each if number > small) for each in [*blocks, outside]]
        ahead = max(cut, default=0)
        zero.setdefault("stage3_max_reuse_distance", 0)
        zero.setdefault("stage3_prefetch_bucket_size", ahead)
        zero.setdefault("stage3_max_live_parameters", always + 2 * ahead)


def _made(config: DeepSpeedConfig, wanted: Wanted) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.stage, "contiguous_gradients": True}
    if config.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": config.offload_optimizer}
    if config.stage == 3:
        # Blocks gather their weights whole; the sub-groups' size is of no use without swapping to disks.
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    made: dict[str, Any] = {
        # A rank's micro-batch counts as one sample, whatever its tokens: the loss is divided before DeepSpeed sees it.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": wanted.accumulation,
        "gradient_clipping": wanted.clip if math.isfinite(wanted.clip) and config.stage > 0 else 0.0,
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # sgd, and Muon beside AdamW
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on host memory too, with nothing to compile
        "steps_per_print": None,
    }
    if wanted.precision == "bfloat16":
        made["bf16"] = {"enabled": True}
        made["data_types"] = {"grad_accum_dtype": "fp32"}
    return made


def _sources() -> dict[str, str]:
    """The recipe's key behind each of DeepSpeed's that the recipe sets."""
    return {
        "gradient_accumulation_steps": "trainer.accumulation",
        "gradient_clipping": "trainer.clip",
        "communication_data_type": "engine=deepspeed, which sums gradients in float32",
        "data_types.grad_accum_dtype": "engine=deepspeed, which sums gradients in float32",
        "bf16.enabled": "trainer.precision",
        "fp16.enabled": "trainer.precision",
        "amp.enabled": "trainer.precision",
        "torch_autocast.enabled": "trainer.precision",
        "zero_optimization.stage": "deepspeed.stage",
        "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
        "zero_optimization.cpu_offload": "deepspeed.offload_optimizer",
        "zero_optimization.offload_param.device": "engine=deepspeed (engine=fsdp has fsdp.cpu_offload)",
        "zero_optimization.cpu_offload_param": "engine=deepspeed (engine=fsdp has fsdp.cpu_offload)",
        "zero_optimization.zero_quantized_weights": "engine=deepspeed, which gathers weights as they are",
        "zero_optimization.zero_quantized_nontrainable_weights": "engine=deepspeed, which gathers weights as they are",
        "zero_optimization.zero_quantized_gradients": "engine=deepspeed, which sums gradients in float32",
        "zero_optimization.contiguous_gradients": "engine=deepspeed, which sums gradients from one buffer",
    }


def _as_deepspeed_reads(zero: dict[str, Any], file: str) -> dict[str, Any]:
    """The section with values of the types that DeepSpeed makes of them; unknown keys and other types are refused."""
    from pydantic import ValidationError  # which comes with DeepSpeed

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # when it is imported it tells of accelerators that are missing
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    finally:
        logging.disable(before)
    names = {field.alias or name: name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    try:
        read = DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        (*above, key), said = error.errors()[0]["loc"], error.errors()[0]["msg"]
        near = "" if above else nearest(str(key), names)
        place = ".".join(map(str, ("zero_optimization", *above, key)))
        raise UsageError(f"deepspeed.config: {file} sets {place}{near}, which DeepSpeed refuses: {said}") from None
    return {
        key: value if isinstance(value, dict) else getattr(read, names.get(key, key)) for key, value in zero.items()
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"deepspeed.config: {path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"deepspeed.config: {path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"deepspeed.config: {path} holds no object, expected DeepSpeed's keys and values")
    return content


def _merge(made: dict[str, Any], given: dict[str, Any], sources: dict[str, str], file: str, above: str) -> None:
    """Write a user's keys into the made ones, which win by refusal."""
    for name, value in given.items():
        key = f"{above}{name}"
        if value == "auto":
            continue
        if key in ELSEWHERE:
            raise UsageError(f"deepspeed.config: {file} sets {key}; {ELSEWHERE[key]}, remove it there")
        if not above and name not in made and name not in TAKEN:
            known = sorted({*made, *TAKEN})
            raise UsageError(
                f"deepspeed.config: {file} sets {key}{nearest(key, known)}, which engine=deepspeed has no use for; it "
                f"takes {', '.join(known)}"
            )
        if isinstance(value, dict):
            inside = made.setdefault(name, {})
            if not isinstance(inside, dict):
                raise UsageError(f"deepspeed.config: {file} gives {key} as an object, expected a value like {inside}")
            _merge(inside, value, sources, file, f"{key}.")
            continue
        if any(known.startswith(f"{key}.") for known in sources) or isinstance(made.get(name), dict):
            raise UsageError(f"deepspeed.config: {file} sets {key} = {json.dumps(value)}, expected an object of keys")
        wanted = made.get(name, _unset(key))
        if key in sources and value != wanted:
            raise UsageError(
                f"deepspeed.config: {file} sets {key} = {json.dumps(value)}, but the recipe's {sources[key]} makes it "
                f"{json.dumps(wanted)}; change one of the two"
            )
        if name in made and key not in sources and not above and value != wanted:
            raise UsageError(
                f"deepspeed.config: {file} sets {key} = {json.dumps(value)}, expected {json.dumps(wanted)}, which "
                "engine=deepspeed needs"
            )
        made[name] = value


def _unset(key: str) -> Any:
    """What a key of the recipe means where it isn't written: no half precision, no offload, nothing quantized."""
    off = (".enabled", ".cpu_offload", ".cpu_offload_param")
    return "none" if key.endswith(".device") else False if key.endswith(off) or ".zero_quantized_" in key else None
