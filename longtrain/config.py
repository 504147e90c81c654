"""From a recipe's name and the command line's ``key=value`` to one frozen, checked `Recipe`.

Hydra composes the YAML; the dataclasses below (and those beside the code that they configure) say which keys and types
exist. Whatever cannot work is refused here, in one line, before any process starts.
"""

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import longtrain.recipes
from longtrain import run_folder
from longtrain.data import DataConfig, check_data
from longtrain.errors import UsageError
from longtrain.layers.pattern import LayersConfig, named_layers, nearest, type_name
from longtrain.memory import RECOMPUTE_POLICIES, MemoryConfig
from longtrain.model import ModelConfig
from longtrain.optimizer import OptimizerConfig, ScheduleConfig, check_optimizer
from longtrain.parallel.attention import STRATEGIES
from longtrain.parallel.layouts import layout_named
from longtrain.parallel.linear.calls import STRATEGIES as SCAN_STRATEGIES
from longtrain.trainer import PRECISIONS, TrainerConfig

RECIPES = Path(longtrain.recipes.__path__[0]).resolve()
ENGINES = ("fsdp",)
# Any mapping of options is allowed here; the mixers themselves check it.
FREE = ("layers.mixers",)
# May be a list or a mapping, and the command line gives it whole: Hydra would merge mappings, and refuse the change of
# one into the other.
WHOLE = ("layers.pattern",)


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks share what."""

    sequence: int | None = None
    data: int | None = None
    rows: int = 1
    layout: str = "zigzag"
    strategy: str = "auto"


@dataclass(frozen=True)
class LaunchConfig:
    """How `longtrain train` starts its processes."""

    processes: int | None = None
    device: str = "auto"
    timeout: float = 600.0


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on. `recipes/base.yaml` says what each key means."""

    recipe: str = ""
    run_dir: str | None = None
    resume: str | None = None
    seed: int = 0
    engine: str = "fsdp"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def recipe_names() -> list[str]:
    """The recipes that come with longtrain."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "base")


def compose(recipe: str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Compose a recipe by name, or by the path of a YAML file of one's own, and check it.

    Raises:
        UsageError: one line with the key, what was given and what would work.
    """
    folder, name = _find(recipe)
    checked = [_checked_override(text) for text in overrides]
    parsed = [OverridesParser.create().parse_overrides([text])[0] for text in checked]
    given = [str(override.key_or_group) for override in parsed]
    whole = {key: override.value() for key, override in zip(given, parsed, strict=True) if key in WHOLE}
    checked = [text for key, text in zip(given, checked, strict=True) if key not in WHOLE]
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            # A recipe outside the package still starts from base.yaml and may use its groups.
            search_path = [] if folder == RECIPES else [f"hydra.searchpath=[file://{RECIPES}]"]
            composed = hydra_compose(name, overrides=[*checked, *search_path])
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        about = _first_line(error) or "it cannot be read"
        raise UsageError(f"recipe {recipe}: {about}; a recipe starts with defaults: [base, _self_]") from error
    OmegaConf.set_struct(composed, False)  # a recipe that leaves base.yaml out has no such key yet
    composed.recipe = name
    for key, value in whole.items():
        OmegaConf.update(composed, key, value, merge=False)
    if "resume" in given and composed.get("resume") is not None:
        composed = _resumed(composed, given)
    return from_mapping(composed)


def read_run(run_dir: Path) -> Recipe:
    """The recipe that a run folder was made with; UsageError where the folder or its config.yaml is not a run's."""
    text = run_folder.read_config(run_dir)
    try:
        saved = OmegaConf.create(text)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UsageError(f"{run_dir / 'config.yaml'} is damaged: {_first_line(error)}") from error
    if not isinstance(saved, DictConfig) or not saved:
        raise UsageError(f"{run_dir / 'config.yaml'} is damaged: it holds no keys")
    return from_mapping(saved)


def _resumed(composed: DictConfig, given: list[str]) -> DictConfig:
    """The configuration of the run to go on with, with only those keys changed that the command line gives."""
    run_dir = Path(composed.resume)
    saved = OmegaConf.create(dataclasses.asdict(read_run(run_dir)))
    if saved.recipe != composed.recipe:
        raise UsageError(f"resume: {run_dir} was made from recipe {saved.recipe}, not {composed.recipe}")
    if "run_dir" in given and composed.run_dir != composed.resume and composed.run_dir != saved.run_dir:
        raise UsageError(f"run_dir: got {composed.run_dir!r} with resume={run_dir}; a resumed run stays in its folder")
    for key in given:
        OmegaConf.update(saved, key, OmegaConf.select(composed, key), merge=key not in WHOLE, force_add=True)
    return saved


def from_mapping(composed: DictConfig) -> Recipe:
    """Check a composed (or a run folder's saved) configuration and make it a `Recipe`."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"{error.full_key}: {_first_line(error)}") from error
    if not isinstance(plain, dict):
        raise UsageError("recipe: got a list, expected keys and values")
    _refuse_unknown(plain, Recipe, "")
    schema = OmegaConf.structured(Recipe)
    _make_writable(schema)
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(plain)))
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        value, kind = OmegaConf.select(composed, key), _keys(Recipe).get(key)
        raise UsageError(
            f"{key}: got {value!r}, expected {type_name(kind) if kind else 'a value of another type'}"
        ) from error
    assert isinstance(recipe, Recipe)
    _check(recipe)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The whole resolved recipe as YAML, which `from_mapping` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)))


def _make_writable(node: DictConfig) -> None:
    """Frozen dataclasses become read-only nodes, which can't be merged into."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        if OmegaConf.is_dict(node[name]):
            _make_writable(node[name])


def _find(recipe: str) -> tuple[Path, str]:
    path = Path(recipe)
    if path.suffix == ".yml":
        raise UsageError(f"recipe: got {recipe}, rename it to end in .yaml")
    if path.suffix == ".yaml":
        if not path.is_file():
            raise UsageError(f"recipe: no file {recipe}")
        return path.resolve().parent, path.stem
    if path.name != recipe or not (RECIPES / f"{recipe}.yaml").is_file():
        names = recipe_names()
        raise UsageError(
            f"recipe: no {recipe!r}{nearest(recipe, names)}; there are {', '.join(names)}, or a .yaml file"
        )
    return RECIPES, recipe


def _checked_override(text: str) -> str:
    """The override for Hydra, after a look at its key: Hydra's own messages don't name what would work."""
    text = _with_quotes(text)
    try:
        override: Override = OverridesParser.create().parse_overrides([text])[0]
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"{text}: expected key=value, such as trainer.steps=100") from error
    key = str(override.key_or_group)
    if not key or override.package is not None:
        raise UsageError(f"{text}: expected key=value, such as trainer.steps=100")
    if override.is_sweep_override():
        raise UsageError(f"{key}: got {text!r}, several values at once; give one (quote text that holds a comma)")
    if override.is_delete():
        raise UsageError(f"{text}: keys can't be removed; give another value")
    if (RECIPES / key).is_dir():
        choices = sorted(path.stem for path in (RECIPES / key).glob("*.yaml"))
        if override.value() not in choices:
            given = str(override.value())
            raise UsageError(f"{key}: no {given!r}{nearest(given, choices)}; there are {', '.join(choices)}")
        return text.lstrip("+")
    if not any(key.startswith(f"{free}.") for free in FREE) and key not in _keys(Recipe):
        raise _no_such_key(key)
    # Options of mixers are not in base.yaml, so they are added rather than replaced.
    return "++" + text.lstrip("+")


def _with_quotes(text: str) -> str:
    """Quote a value that is text: a path may hold what Hydra's grammar gives a meaning (``=``, brackets, commas)."""
    key, equals, value = text.partition("=")
    if value in (".inf", "-.inf", ".nan"):  # as YAML writes them; Hydra's command line has no dot
        return f"{key}={value.replace('.', '')}"
    if _keys(Recipe).get(key.lstrip("+")) not in (str, str | None) or not equals or value in ("", "null"):
        return text
    if value[0] == value[-1] and value[0] in "'\"":
        return text
    return quoted_override(key, value)


def quoted_override(key: str, value: str) -> str:
    """`key='value'` for Hydra, whatever characters the value holds."""
    # Backslashes count double before a quote and at the end, and are plain text elsewhere: Hydra's rule.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"{key}='{escaped}'"


def _keys(kind: type, prefix: str = "") -> dict[str, Any]:
    """Every key of a tree of dataclasses with its type."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            keys |= _keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            keys[prefix + name] = hint
    return keys


def _no_such_key(key: str) -> UsageError:
    below = [known for known in _keys(Recipe) if known.startswith(f"{key}.")]
    if below:
        return UsageError(f"{key}: is a section, give a key below it: {', '.join(below)}")
    return UsageError(f"{key}: no such key{nearest(key, _keys(Recipe))}; longtrain/recipes/base.yaml lists all keys")


def _refuse_unknown(given: dict[Any, Any], kind: type, prefix: str) -> None:
    hints = typing.get_type_hints(kind)
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name == "_target_":
            raise UsageError(f"{key}: recipes can't name Python objects to import; remove it")
        if name not in hints:
            raise _no_such_key(key)
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                below = ", ".join(f"{key}.{part}" for part in typing.get_type_hints(hints[name]))
                raise UsageError(f"{key}: got {value!r}, expected keys below it: {below}")
            _refuse_unknown(value, typing.cast(type, hints[name]), f"{key}.")


def _check(recipe: Recipe) -> None:
    """Refuse what has the right type and still cannot work."""
    _at_least("seed", recipe.seed, 0)
    _at_most("seed", recipe.seed, 2**63 - 1)
    for key, value in (("run_dir", recipe.run_dir), ("resume", recipe.resume)):
        if value == "":
            raise UsageError(f"{key}: got an empty name, expected a folder (null: none given)")
    _one_of("engine", recipe.engine, ENGINES)
    _one_of("memory.recompute", recipe.memory.recompute, RECOMPUTE_POLICIES)
    if recipe.parallel.strategy in set(SCAN_STRATEGIES) - set(STRATEGIES):
        raise UsageError(
            f"parallel.strategy: got {recipe.parallel.strategy!r}, which is a way for states of linear mixers: "
            f"layers.mixers.NAME.strategy takes it; expected for attention one of {', '.join(map(repr, STRATEGIES))}"
        )
    _one_of("parallel.strategy", recipe.parallel.strategy, STRATEGIES)
    _one_of("trainer.precision", recipe.trainer.precision, tuple(PRECISIONS))
    _one_of("launch.device", recipe.launch.device, ("auto", "cpu", "cuda"))
    check_data(recipe.data)
    _at_least("model.width", recipe.model.width, 1)
    _at_least("model.depth", recipe.model.depth, 1)
    _at_least("launch.timeout", recipe.launch.timeout, 1)
    _at_most("launch.timeout", recipe.launch.timeout, 1e6)
    _at_least("model.norm_eps", recipe.model.norm_eps, 0)
    _at_most("model.norm_eps", recipe.model.norm_eps, 1)
    _at_most("model.width", recipe.model.width, 2**20)
    _at_least("parallel.rows", recipe.parallel.rows, 1)
    for key in ("model.mlp_width", "parallel.sequence", "parallel.data", "launch.processes"):
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        if value is not None:
            _at_least(key, value, 1)
    _check_trainer(recipe.trainer)
    check_optimizer(recipe.optimizer, recipe.schedule)
    try:
        layout_named(recipe.parallel.layout)
    except ValueError as error:
        raise UsageError(f"parallel.{error}") from error
    try:
        named_layers(recipe.layers, width=recipe.model.width, depth=recipe.model.depth)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if recipe.launch.processes is not None:
        degrees(recipe, recipe.launch.processes)
    elif recipe.parallel.sequence is not None:
        _check_ranks(recipe, recipe.parallel.sequence)


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
    for layer in named_layers(recipe.layers, width=recipe.model.width, depth=recipe.model.depth):
        try:
            layer.mixer.check_ranks(layer.options, strategy=recipe.parallel.strategy, ranks=sequence, rows=rows)
        except ValueError as error:
            own = getattr(layer.options, "strategy", "auto") != "auto"
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


def _first_line(error: Exception) -> str:
    """The first line of another library's message, or all of a YAML error, which tells the place in its later lines."""
    return str(error).strip() if isinstance(error, YAMLError) else str(error).strip().split("\n")[0]
