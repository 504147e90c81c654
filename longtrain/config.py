"""From a recipe's name and the command line's ``key=value`` to one frozen, checked `Recipe`.

Hydra composes the YAML; the dataclasses of `recipe` say which keys and types exist. Whatever cannot be read is refused
here, in one line, before any process starts.
"""

import dataclasses
import re
import typing
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
from longtrain import checkpoint, run_folder
from longtrain.errors import UsageError, nearest
from longtrain.layers.pattern import type_name
from longtrain.linearisation import Source, check_source, differing
from longtrain.recipe import Recipe, check, model_vocabulary, recipe_layers

RECIPES = Path(longtrain.recipes.__path__[0]).resolve()
# Any mapping of options is allowed here; the mixers themselves check it.
FREE = ("layers.mixers",)
# May be a list or a mapping, and the command line gives it whole: Hydra would merge mappings, and refuse the change of
# one into the other.
WHOLE = ("layers.pattern", "memory.recompute")


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
    made = from_mapping(composed)
    if made.resume is None:  # a run that goes on may need it no longer
        source_of(made)
    return made


def source_of(recipe: Recipe) -> Source | None:
    """The trained model that a recipe starts from, or None; UsageError where the recipe's model cannot."""
    linearise = recipe.linearise
    if linearise.from_ is None:
        if linearise.match_steps:
            raise UsageError(
                f"linearise.from: got null with linearise.match_steps = {linearise.match_steps}; linearise.from=RUN "
                "would work, with the folder of a trained run of softmax layers"
            )
        return None
    folder = Path(linearise.from_)
    try:
        other = read_run(folder)
        taken = checkpoint.latest(folder)
    except UsageError as error:
        raise UsageError(f"linearise.from: {error}") from error
    if taken is None:
        raise UsageError(f"linearise.from: {folder} has no checkpoint yet; the folder of a run that ended would work")
    source = Source(taken, folder, other.model, tuple(recipe_layers(other)), model_vocabulary(other))
    check_source(source, model=recipe.model, layers=recipe_layers(recipe), vocabulary=model_vocabulary(recipe))
    if linearise.match_steps and not differing(source, recipe_layers(recipe)):
        raise UsageError(
            f"layers.pattern: got the layers of linearise.from={folder} with linearise.match_steps = "
            f"{linearise.match_steps}: there is nothing to match; layers.pattern=gsa or lizard would work, or "
            "linearise.match_steps=0"
        )
    return source


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
    saved = OmegaConf.create(_as_written(read_run(run_dir)))
    if saved.recipe != composed.recipe:
        raise UsageError(f"resume: {run_dir} was made from recipe {saved.recipe}, not {composed.recipe}")
    if "run_dir" in given and composed.run_dir != composed.resume and composed.run_dir != saved.run_dir:
        raise UsageError(f"run_dir: got {composed.run_dir!r} with resume={run_dir}; a resumed run stays in its folder")
    for key in ("linearise.from", "linearise.match_steps"):
        wanted, kept = (OmegaConf.select(settings, key) for settings in (composed, saved))
        if key in given and wanted != kept:
            raise UsageError(f"{key}: got {wanted!r} with resume={run_dir}, which has {kept!r} and keeps it")
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
        recipe = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(_as_fields(plain, Recipe))))
    except OmegaConfBaseException as error:
        key = ".".join(map(written, str(error.full_key or "").split(".")))
        value, kind = OmegaConf.select(composed, key), _keys(Recipe).get(key)
        raise UsageError(
            f"{key}: got {value!r}, expected {type_name(kind) if kind else 'a value of another type'}"
        ) from error
    assert isinstance(recipe, Recipe)
    check(recipe)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The whole resolved recipe as YAML, which `from_mapping` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(_as_written(recipe)))


def written(field: str) -> str:
    """The key that a recipe has for a field: its name, but for `from_`, since `from` is a word of Python's."""
    return field.removesuffix("_")


def _as_written(section: Any) -> dict[str, Any]:
    """A tree of dataclasses as mappings with the recipe's keys."""
    values = {written(field.name): getattr(section, field.name) for field in dataclasses.fields(section)}
    return {key: _as_written(value) if dataclasses.is_dataclass(value) else value for key, value in values.items()}


def _as_fields(given: dict[Any, Any], kind: type) -> dict[str, Any]:
    """The recipe's keys as the fields of a tree of dataclasses."""
    hints = {written(name): (name, hint) for name, hint in typing.get_type_hints(kind).items()}
    fields: dict[str, Any] = {}
    for key, value in given.items():
        name, hint = hints[key]
        fields[name] = _as_fields(value, typing.cast(type, hint)) if dataclasses.is_dataclass(hint) else value
    return fields


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
            keys[prefix + written(name)] = hint
    return keys


def _no_such_key(key: str) -> UsageError:
    below = [known for known in _keys(Recipe) if known.startswith(f"{key}.")]
    if below:
        return UsageError(f"{key}: is a section, give a key below it: {', '.join(below)}")
    return UsageError(f"{key}: no such key{nearest(key, _keys(Recipe))}; longtrain/recipes/base.yaml lists all keys")


def _refuse_unknown(given: dict[Any, Any], kind: type, prefix: str) -> None:
    hints = {written(name): hint for name, hint in typing.get_type_hints(kind).items()}
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
        elif key == "layers.mixers" and isinstance(value, dict):
            _check_mappings(value)


def _check_mappings(mixers: dict[Any, Any]) -> None:
    for name, options in mixers.items():
        if not isinstance(name, str):
            raise UsageError(f"layers.mixers: got the name {name!r}, expected text, a mixer's or one of your own")
        if not isinstance(options, dict):
            raise UsageError(f"layers.mixers.{name}: got {options!r}, expected its options, such as {{heads: 8}}")


def _first_line(error: Exception) -> str:
    """The first line of another library's message, or all of a YAML error, which tells the place in its later lines."""
    return str(error).strip() if isinstance(error, YAMLError) else str(error).strip().split("\n")[0]
