"""What a run depends on, as frozen dataclasses, and what of it cannot work together.

The dataclasses below, and those beside the code that they configure, say which keys and types exist; `config` reads
them from YAML and the command line. What cannot work is refused here, in one line, before any process starts.
"""

import math
import re
import typing
from dataclasses import dataclass, field, fields

from longtrain.data import DataConfig, check_data, vocabulary_of
from longtrain.engines import (
    PRECISIONS,
    DeepSpeedConfig,
    FSDPConfig,
    Wanted,
    check_deepspeed,
    check_fsdp,
    check_options,
    check_replicas,
)
from longtrain.errors import UsageError, nearest
from longtrain.layers.pattern import Layer, LayersConfig, named_layers, takes_heads_at_once, takes_strategy
from longtrain.linearisation import LineariseConfig, check_linearise
from longtrain.memory import MemoryConfig, check_memory, layer_policies
from longtrain.model import ModelConfig
from longtrain.optimizer import OptimizerConfig, ScheduleConfig, check_optimizer
from longtrain.parallel.attention import STRATEGIES
from longtrain.parallel.layouts import layout_named
from longtrain.parallel.linear.calls import STRATEGIES as SCAN_STRATEGIES
from longtrain.trainer import TrainerConfig

ENGINES = ("fsdp", "deepspeed")
LAUNCHERS = ("local", "torchrun", "deepspeed", "slurm")


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks share what."""

    sequence: int | None = None
    data: int | None = None
    rows: int = 1
    layout: str = "zigzag"
    strategy: str = "auto"


@dataclass(frozen=True)
class SlurmConfig:
    """What a SLURM job asks for."""

    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    setup: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LaunchConfig:
    """How `longtrain train` starts its processes."""

    launcher: str = "local"
    processes: int | None = None
    device: str = "auto"
    timeout: float = 600.0
    nodes: int | None = None
    hostfile: str | None = None
    address: str | None = None
    node_rank: int | None = None
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on. `recipes/base.yaml` says what each key means."""

    recipe: str = ""
    run_dir: str | None = None
    resume: str | None = None
    seed: int = 0
    engine: str = "fsdp"
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    linearise: LineariseConfig = field(default_factory=LineariseConfig)


def check(recipe: Recipe) -> None:
    """Refuse what has the right type and still cannot work."""
    _at_least("seed", recipe.seed, 0)
    _at_most("seed", recipe.seed, 2**63 - 1)
    folders = (("run_dir", recipe.run_dir), ("resume", recipe.resume), ("linearise.from", recipe.linearise.from_))
    for key, value in folders:
        if value == "":
            raise UsageError(f"{key}: got an empty name, expected a folder (null: none given)")
    _one_of("engine", recipe.engine, ENGINES)
    if recipe.parallel.strategy in set(SCAN_STRATEGIES) - set(STRATEGIES):
        raise UsageError(
            f"parallel.strategy: got {recipe.parallel.strategy!r}, which is a way for states of linear mixers: "
            f"layers.mixers.NAME.strategy takes it; expected for attention one of {', '.join(map(repr, STRATEGIES))}"
        )
    _one_of("parallel.strategy", recipe.parallel.strategy, STRATEGIES)
    _one_of("trainer.precision", recipe.trainer.precision, tuple(PRECISIONS))
    _check_launch(recipe.launch)
    check_data(recipe.data)
    _check_vocabulary(recipe)
    _at_least("model.width", recipe.model.width, 1)
    _at_least("model.depth", recipe.model.depth, 1)
    _at_least("model.meta_tokens", recipe.model.meta_tokens, 0)
    _at_least("model.norm_eps", recipe.model.norm_eps, 0)
    _at_most("model.norm_eps", recipe.model.norm_eps, 1)
    _at_most("model.width", recipe.model.width, 2**20)
    _at_least("parallel.rows", recipe.parallel.rows, 1)
    for key in ("model.mlp_width", "parallel.sequence", "parallel.data"):
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        if value is not None:
            _at_least(key, value, 1)
    _check_trainer(recipe.trainer)
    _check_engine(recipe)
    check_linearise(recipe.linearise, steps=recipe.trainer.steps, engine=recipe.engine)
    check_optimizer(recipe.optimizer, recipe.schedule)
    try:
        layout_named(recipe.parallel.layout)
    except ValueError as error:
        raise UsageError(f"parallel.{error}") from error
    _check_layers(recipe)
    if recipe.launch.processes is not None:
        degrees(recipe, recipe.launch.processes)
    elif recipe.parallel.sequence is not None:
        _check_ranks(recipe, recipe.parallel.sequence)


def _check_launch(launch: LaunchConfig) -> None:
    _one_of("launch.launcher", launch.launcher, LAUNCHERS)
    _one_of("launch.device", launch.device, ("auto", "cpu", "cuda"))
    _at_least("launch.timeout", launch.timeout, 1)
    _at_most("launch.timeout", launch.timeout, 1e6)
    counts = {f"launch.{name}": getattr(launch, name) for name in ("processes", "nodes")}
    counts |= {f"launch.slurm.{name}": getattr(launch.slurm, name) for name in ("gpus_per_node", "cpus_per_node")}
    for key, value in counts.items():
        if value is not None:
            _at_least(key, value, 1)
    if launch.node_rank is not None:
        _at_least("launch.node_rank", launch.node_rank, 0)
    if launch.address is not None and not re.fullmatch(r"[^\s:]+(:\d{1,5})?|\S+:\d{1,5}", launch.address):
        raise UsageError(f"launch.address: got {launch.address!r}, expected HOST or HOST:PORT")
    if launch.launcher == "local" and (launch.hostfile is not None or (launch.nodes or 1) > 1):
        key = "nodes" if launch.hostfile is None else "hostfile"
        raise UsageError(
            f"launch.{key}: got {getattr(launch, key)!r} with launch.launcher=local, which starts this machine's "
            "processes alone; torchrun, deepspeed or slurm would work"
        )
    if launch.launcher == "slurm" and launch.hostfile is not None:
        raise UsageError(
            f"launch.hostfile: got {launch.hostfile!r}, but SLURM chooses the hosts; launch.nodes would work"
        )


def model_vocabulary(recipe: Recipe) -> int:
    """Number of token ids of the recipe's model: its own, or that of its data."""
    return vocabulary_of(recipe.data) if recipe.model.vocabulary is None else recipe.model.vocabulary


def recipe_layers(recipe: Recipe, layers: LayersConfig | None = None) -> list[Layer]:
    """The layers of the recipe's model; others than its own where they are given."""
    model = recipe.model
    return named_layers(layers or recipe.layers, width=model.width, depth=model.depth, meta=model.meta_tokens)


def _check_vocabulary(recipe: Recipe) -> None:
    own = recipe.model.vocabulary
    if own is None:
        return
    _at_most("model.vocabulary", own, 2**24)
    needed = vocabulary_of(recipe.data)
    if own < needed:
        raise UsageError(
            f"model.vocabulary: got {own}, the data has {needed} token ids; expected {needed} or more, or null"
        )


def _check_layers(recipe: Recipe) -> None:
    """Refuse layers that cannot be, memory policies for others, and a strategy that none of them would take."""
    try:
        layers = recipe_layers(recipe)
        check_memory(recipe.memory, [layer.name for layer in layers])
    except ValueError as error:
        raise UsageError(str(error)) from error
    _check_pamm(recipe, layers)
    _check_heads_at_once(recipe, layers)
    _check_pieces(recipe, layers)
    _check_windows(recipe, layers)
    if recipe.parallel.strategy == "auto":
        return
    attending = {layer.name for layer in layers if takes_strategy(layer.mixer)}
    if not attending:
        raise UsageError(
            f"parallel.strategy: got {recipe.parallel.strategy!r}, which is for layers that attend, and layers.pattern "
            "has none: auto would work, or a softmax layer; a recurrence takes layers.mixers.NAME.strategy, one of "
            f"{', '.join(SCAN_STRATEGIES)}"
        )
    if all(layer.options.strategy != "auto" for layer in layers if layer.name in attending):
        raise UsageError(
            f"parallel.strategy: got {recipe.parallel.strategy!r}, which no layer would take: "
            f"{', '.join(sorted(attending))} {'have their' if len(attending) > 1 else 'has its'} own; auto would work, "
            f"or no layers.mixers.{min(attending)}.strategy"
        )


def _check_engine(recipe: Recipe) -> None:
    check_fsdp(recipe.fsdp)
    check_options(recipe.deepspeed)
    other = "deepspeed" if recipe.engine == "fsdp" else "fsdp"
    config = getattr(recipe, other)
    for option in fields(config):
        if getattr(config, option.name) != option.default:
            raise UsageError(
                f"{other}.{option.name}: got {getattr(config, option.name)!r} with engine={recipe.engine}, which does "
                f"not read it; engine={other} would"
            )
    if recipe.engine == "deepspeed":
        if recipe.optimizer.adam != "fused":
            raise UsageError(
                f"optimizer.adam: got {recipe.optimizer.adam!r} with engine=deepspeed, which cuts weights where 8-bit "
                "blocks cannot be cut; optimizer.adam=fused or engine=fsdp would work"
            )
        wanted = Wanted(
            precision=recipe.trainer.precision, clip=recipe.trainer.clip, accumulation=recipe.trainer.accumulation
        )
        check_deepspeed(recipe.deepspeed, wanted)


def _check_pamm(recipe: Recipe, layers: typing.Sequence[Layer]) -> None:
    """Refuse to keep few tokens of an input of which recompute keeps none."""
    policies = layer_policies(recipe.memory.recompute, [layer.name for layer in layers])
    for layer, policy in zip(layers, policies, strict=True):
        pamm = getattr(layer.options, "pamm", None)
        if pamm is not None and policy.recompute:
            raise UsageError(
                f"layers.mixers.{layer.name}.pamm: got {pamm}, which saves nothing where memory.recompute = "
                f"{recipe.memory.recompute} keeps no input of projections: memory.recompute=none would work"
            )


def _check_heads_at_once(recipe: Recipe, layers: typing.Sequence[Layer]) -> None:
    """Refuse a number of heads that no layer would take."""
    given = recipe.memory.attention_heads
    if given is None:
        return
    attending = {layer.name for layer in layers if takes_heads_at_once(layer.mixer)}
    if not attending:
        raise UsageError(
            f"memory.attention_heads: got {given}, which is for softmax attention, and layers.pattern has none: null "
            "would work, or a softmax layer"
        )
    if all(layer.options.heads_at_once is not None for layer in layers if layer.name in attending):
        raise UsageError(
            f"memory.attention_heads: got {given}, but every layer of {', '.join(sorted(attending))} has its own; null "
            f"would work, or no layers.mixers.{min(attending)}.heads_at_once"
        )


def _check_pieces(recipe: Recipe, layers: typing.Sequence[Layer]) -> None:
    """Refuse pieces that are longer than the sequences that they cut: all would be padding."""
    length = recipe.data.length
    for layer in layers:
        cut = layer.mixer.pieces(layer.options)
        if cut is not None and cut[1] > length:
            raise UsageError(
                f"layers.mixers.{layer.name}.{cut[0]}: got pieces of {cut[1]:,} tokens, longer than the sequences that "
                f"they cut; {length:,} tokens or fewer would work, or a data.length of {cut[1]:,} or more"
            )


def _check_windows(recipe: Recipe, layers: typing.Sequence[Layer]) -> None:
    """Refuse windows that hold more than whole sequences: they would see what full attention sees.

    A mixer's default is not asked for and may be wider.
    """
    length = recipe.data.length
    for layer in layers:
        for option in fields(layer.options):
            window = getattr(layer.options, option.name)
            if option.name == "window" and window not in (None, option.default) and window >= length:
                raise UsageError(
                    f"layers.mixers.{layer.name}.window: got {window:,} tokens besides its own, as many as the "
                    f"sequences have or more, which cuts nothing; {length - 1:,} or fewer would work, or a data.length "
                    f"above {window:,}"
                )


def _check_trainer(trainer: TrainerConfig) -> None:
    _at_least("trainer.steps", trainer.steps, 1)
    _at_least("trainer.sequences", trainer.sequences, 1)
    _at_least("trainer.accumulation", trainer.accumulation, 1)
    _at_least("trainer.evaluate_every", trainer.evaluate_every, 0)
    _at_least("trainer.evaluate_sequences", trainer.evaluate_sequences, 1)
    _at_least("trainer.checkpoint_every", trainer.checkpoint_every, 0)
    _at_least("trainer.keep_checkpoints", trainer.keep_checkpoints, 1)
    if not trainer.clip > 0:
        raise UsageError(f"trainer.clip: got {trainer.clip}, expected a norm above 0 (.inf: no clipping)")


def degrees(recipe: Recipe, processes: int) -> tuple[int, int]:
    """(data, sequence) degrees for this many processes; null ones are worked out.

    Raises:
        UsageError: the degrees do not fit the processes, or the step's sequences do not fit the degrees.
    """
    data, sequence = recipe.parallel.data, recipe.parallel.sequence
    for key, degree in (("parallel.sequence", sequence), ("parallel.data", data)):
        if degree is not None and processes % degree:
            fits = [str(n) for n in range(1, processes + 1) if processes % n == 0]
            raise UsageError(
                f"{key}: got {degree}, it must divide the {processes} processes (launch.processes): {', '.join(fits)}"
            )
    if sequence is None:
        sequence = processes // (data or 1)
    if data is None:
        data = processes // sequence
    if data * sequence != processes:
        raise UsageError(
            f"parallel.data: got {data} x parallel.sequence = {sequence}, that is {data * sequence} and not the "
            f"{processes} processes; parallel.data={processes // sequence} would work"
        )
    _check_ranks(recipe, sequence)
    if recipe.engine == "fsdp":
        check_replicas(recipe.fsdp, processes)
    micro = data * recipe.trainer.accumulation
    if recipe.trainer.sequences % micro:
        raise UsageError(
            f"trainer.sequences: got {recipe.trainer.sequences}, it must be a multiple of data degree x "
            f"trainer.accumulation = {data} x {recipe.trainer.accumulation}; trainer.sequences="
            f"{math.ceil(recipe.trainer.sequences / micro) * micro} would work"
        )
    return data, sequence


def _check_ranks(recipe: Recipe, sequence: int) -> None:
    """Refuse rows and mixers that so many ranks cannot share a sequence with."""
    rows = recipe.parallel.rows
    if sequence % rows:
        raise UsageError(f"parallel.rows: got {rows}, it must divide the {sequence} ranks that share a sequence")
    for layer in recipe_layers(recipe):
        try:
            layer.mixer.check_ranks(layer.options, strategy=recipe.parallel.strategy, ranks=sequence, rows=rows)
        except ValueError as error:
            # Of a mixer's strategies one may be the recipe's, the one that is called so.
            own = getattr(layer.options, "strategy", "auto") != "auto" or not str(error).startswith("strategy:")
            section = f"layers.mixers.{layer.name}" if own else "parallel"
            raise UsageError(f"{section}.{error}") from error


def _one_of(key: str, value: str, allowed: typing.Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{key}: got {value!r}{nearest(value, allowed)}, expected one of {', '.join(allowed)}")


def _at_least(key: str, value: float, least: float) -> None:
    if not value >= least:
        raise UsageError(f"{key}: got {value}, expected {least} or more")


def _at_most(key: str, value: float, most: float) -> None:
    if not value <= most:
        raise UsageError(f"{key}: got {value}, expected {most} or less")
