"""Which mixer each layer has, and with which options.

``layers.pattern`` is one of four things:

- a name: every layer has this mixer;
- a list of names, repeated over the depth: ``[lightning, lightning, softmax]``;
- a ratio, a mapping of names to whole numbers: ``{gla: 3, softmax: 1}``. The layers are cut into groups of 3 + 1; in a
  group each mixer's layers lie evenly, ending the group, and where two mixers are due the one with more layers goes
  first: gla, gla, gla, softmax;
- layer sets, a mapping of names to layers counted from 0, and `default` for those that are in none:
  ``{softmax: [3, 7, -1], default: gla}``, or as Python's slices, ``{softmax: "3::4", default: gla}``.

A name is a mixer's, or one of ``layers.mixers`` that says which mixer it stands for, so that one mixer can have
different options in different layers: ``layers.mixers: {narrow: {mixer: softmax, window: 128}}``.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longtrain.errors import nearest
from longtrain.layers.mixers import MIXERS, LayerPlace, Mixer, RecurrentMixer

DEFAULT = "default"
"""In layer sets: the mixer of the layers that no set has."""

MIXER = "mixer"
"""Among the options of a name of one's own: the mixer that it stands for."""


@dataclass(frozen=True)
class LayersConfig:
    """The mixers of a model."""

    pattern: Any = "softmax"  # a name, a list of names, a ratio or layer sets
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One layer as the recipe has it."""

    name: str  # as the pattern calls it
    mixer: type[Mixer]
    options: Any  # of mixer.Config
    place: LayerPlace


def type_name(kind: Any) -> str:
    """A type as a person says it: ``int | None`` is "a whole number or null"."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if typing.get_origin(kind) is dict:
        return "a mapping such as {softmax: {heads: 8}}"
    return " or ".join(names.get(part, str(part)) for part in typing.get_args(kind) or (kind,))


def plan_layers(config: LayersConfig, *, width: int, depth: int) -> list[tuple[type[Mixer], Any, LayerPlace]]:
    """Mixer class, its options and its place, for each of ``depth`` layers; raises as `named_layers` does."""
    return [(layer.mixer, layer.options, layer.place) for layer in named_layers(config, width=width, depth=depth)]


def named_layers(config: LayersConfig, *, width: int, depth: int, meta: int = 0) -> list[Layer]:
    """Each of ``depth`` layers of a model with so many meta tokens.

    Raises:
        ValueError: a pattern that does not fit the depth, an unknown mixer or option (the nearest name is given),
            options that a mixer refuses, in the pattern or not, a layer that cannot take what the one before hands on,
            or that cannot have meta tokens before it; the text starts with the recipe's key.
    """
    kinds, layers = _kinds(config), []
    options = {name: _options(name, *kinds[name]) for name in config.mixers}
    for index, name in enumerate(layer_names(config, depth)):
        mixer, place = kinds[name][0], LayerPlace(width=width, index=index, depth=depth, meta=meta)
        layers.append(Layer(name, mixer, options.get(name) or mixer.Config(), place))
    unused = options.keys() - {layer.name for layer in layers}
    first = LayerPlace(width=width, index=0, depth=depth, meta=meta)
    for layer in (*layers, *(Layer(name, kinds[name][0], options[name], first) for name in sorted(unused))):
        try:
            layer.mixer.check(layer.options, layer.place)
        except ValueError as error:
            raise ValueError(f"layers.mixers.{layer.name}.{error}") from None
    _check_neighbours(layers)
    if meta and (others := sorted({layer.name for layer in layers if not layer.mixer.takes_meta})):
        able = ", ".join(name for name, mixer in MIXERS.items() if mixer.takes_meta)
        raise ValueError(
            f"model.meta_tokens: got {meta}, which {', '.join(others)} cannot have in front of the text; {able} can, "
            "and 0 works with all mixers"
        )
    return layers


def hands_on(layers: Sequence[Layer]) -> list[bool]:
    """Of each layer, whether the next one takes what it hands on."""
    return [after.mixer.takes_shared(after.options) for after in layers[1:]] + [False]


def _check_neighbours(layers: Sequence[Layer]) -> None:
    for before, layer in zip((None, *layers), layers, strict=False):
        if not layer.mixer.takes_shared(layer.options):
            continue
        try:
            layer.mixer.check_before(layer.options, None if before is None else (before.mixer, before.options))
        except ValueError as error:
            raise ValueError(f"layers.mixers.{layer.name}.{error} (layer {layer.place.index})") from None


def takes_strategy(mixer: type[Mixer]) -> bool:
    """Whether a recipe's ``parallel.strategy`` is for this mixer: one that attends; recurrences have others."""
    has_one = any(option.name == "strategy" for option in dataclasses.fields(mixer.Config))
    return has_one and not issubclass(mixer, RecurrentMixer)


def layer_names(config: LayersConfig, depth: int) -> list[str]:
    """The name of each layer's mixer as the pattern has it; raises a ValueError as `named_layers` does."""
    pattern, known = config.pattern, list(_kinds(config))
    if isinstance(pattern, str):
        _check_name(pattern, known)
        return [pattern] * depth
    if isinstance(pattern, list):
        if not pattern:
            raise ValueError(f"layers.pattern: got an empty list, it must name one or more of {', '.join(known)}")
        for name in pattern:
            _check_name(name, known)
        return [pattern[index % len(pattern)] for index in range(depth)]
    if not isinstance(pattern, dict) or not pattern:
        raise ValueError(
            f"layers.pattern: got {pattern!r}, expected a name, a list such as [gla, softmax], a ratio such as "
            "{gla: 3, softmax: 1}, or layers such as {softmax: [3, 7], default: gla}"
        )
    for name in pattern:
        if name != DEFAULT:
            _check_name(name, known)
    if DEFAULT not in pattern and all(_whole(count) for count in pattern.values()):
        return _in_ratio(pattern, depth)
    for name, count in pattern.items():
        if isinstance(count, bool | float):
            raise ValueError(f"layers.pattern.{name}: got {count!r}, expected a whole number (a ratio) or layers")
    return _in_sets(pattern, depth, known)


def describe_layers(config: LayersConfig, depth: int) -> str:
    """The layers' names in a few words: "lightning softmax", once if they repeat, runs of three or more counted."""
    names = layer_names(config, depth)
    period = next(n for n in range(1, depth + 1) if names == names[:n] * (depth // n))
    words: list[str] = []
    for name in names[:period]:
        words.append(name)
        if len(words) >= 3 and words[-3:] == [name] * 3:
            words[-3:] = [f"3 x {name}"]
        elif len(words) >= 2 and re.fullmatch(rf"\d+ x {re.escape(name)}", words[-2]):
            words[-2:] = [f"{int(words[-2].split()[0]) + 1} x {name}"]
    return " ".join(words)


def takes_heads_at_once(mixer: type[Mixer]) -> bool:
    """Whether a recipe's ``memory.attention_heads`` is for this mixer."""
    return any(option.name == "heads_at_once" for option in dataclasses.fields(mixer.Config))


def with_strategy(config: LayersConfig, strategy: str, *, heads_at_once: int | None = None) -> LayersConfig:
    """The same layers, those that attend with this strategy, and so many key heads at once, unless they have their own.

    Recurrences have other strategies.
    """
    mixers = {name: dict(options) for name, options in config.mixers.items()}
    for name, (mixer, options) in _kinds(config).items():
        if takes_strategy(mixer) and options.get("strategy", "auto") == "auto":
            mixers.setdefault(name, {})["strategy"] = strategy
        if heads_at_once is not None and takes_heads_at_once(mixer) and options.get("heads_at_once") is None:
            mixers.setdefault(name, {})["heads_at_once"] = heads_at_once
    return dataclasses.replace(config, mixers=mixers)


def _in_ratio(counts: Mapping[str, int], depth: int) -> list[str]:
    shown = _shown(counts)
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"layers.pattern: got {shown}, {name} needs a count of 1 or more")
    common = math.gcd(*counts.values())
    layers = {name: count // common for name, count in counts.items()}  # of a group
    group = sum(layers.values())
    if depth % group:
        fits = [str(fit) for fit in (depth // group * group, (depth // group + 1) * group) if fit]
        raise ValueError(
            f"layers.pattern: got {shown}, groups of {group} layers, with model.depth = {depth}, which is no multiple; "
            f"model.depth={' or '.join(fits)} would work"
        )
    # The j-th of a mixer's n layers is due at j/n of the group.
    due = [(j / n, -n, name) for name, n in layers.items() for j in range(1, n + 1)]
    return [name for _, _, name in sorted(due, key=lambda entry: entry[:2])] * (depth // group)


def _in_sets(sets: Mapping[str, Any], depth: int, known: list[str]) -> list[str]:
    names: list[str | None] = [None] * depth
    for name, where in sets.items():
        if name == DEFAULT:
            if not isinstance(where, str):
                raise ValueError(f"layers.pattern.{DEFAULT}: got {where!r}, expected the name of a mixer")
            _check_name(where, known)
            continue
        for index in _layers(f"layers.pattern.{name}", where, depth):
            if names[index] is not None:
                raise ValueError(f"layers.pattern.{name}: got layer {index}, which {names[index]} has already")
            names[index] = name
    free = [str(index) for index, name in enumerate(names) if name is None]
    if free and DEFAULT not in sets:
        raise ValueError(
            f"layers.pattern: got {_shown(sets)}, layers {', '.join(free)} have no mixer; add {DEFAULT}: <mixer>"
        )
    return [sets[DEFAULT] if name is None else name for name in names]


def _layers(key: str, where: Any, depth: int) -> list[int]:
    """The layers that a list or a slice names."""
    expected = f"expected layers from 0 to {depth - 1} in a list such as [0], or a slice such as '1::2'"
    if isinstance(where, list) and where and all(_whole(index) for index in where):
        for index in where:
            if not -depth <= index < depth:
                raise ValueError(f"{key}: got layer {index}, model.depth = {depth} has layers 0 to {depth - 1}")
        return [index % depth for index in where]
    slice_ = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*(?::\s*(\d+)?\s*)?", where) if isinstance(where, str) else None
    if slice_ is None:
        hint = "; in a ratio every mixer has a number and there is no default" if _whole(where) else ""
        raise ValueError(f"{key}: got {where!r}, {expected}{hint}")
    start, stop, step = (None if part is None else int(part) for part in slice_.groups())
    found = [] if step == 0 else list(range(depth))[start:stop:step]
    if not found or any(end is not None and not -depth <= end <= depth for end in (start, stop)):
        raise ValueError(f"{key}: got {where!r}, which does not fit model.depth = {depth}; {expected}")
    return found


def _kinds(config: LayersConfig) -> dict[str, tuple[type[Mixer], dict[str, Any]]]:
    """Every name that a pattern may use: its mixer and the options given for it."""
    kinds: dict[str, tuple[type[Mixer], dict[str, Any]]] = {name: (mixer, {}) for name, mixer in MIXERS.items()}
    for name, given in config.mixers.items():
        options = dict(given)
        stands_for = options.pop(MIXER, name)
        if name == DEFAULT or (name in MIXERS and stands_for != name):
            raise ValueError(f"layers.mixers.{name}: that name is taken; choose another for a mixer with its options")
        if stands_for not in MIXERS:
            key = f"layers.mixers.{name}" + (f".{MIXER}" if MIXER in given else "")
            hint = "" if MIXER in given else f"; a name of your own says which it stands for: {{{MIXER}: softmax}}"
            raise ValueError(
                f"{key}: no mixer {stands_for!r}{nearest(str(stands_for), MIXERS)}; there are {', '.join(MIXERS)}{hint}"
            )
        kinds[name] = MIXERS[stands_for], options
    return kinds


def _check_name(name: Any, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"layers.pattern: no mixer {name!r}{nearest(str(name), known)}; there are {', '.join(known)}")


def _options(name: str, mixer: type[Mixer], given: dict[str, Any]) -> Any:
    types = typing.get_type_hints(mixer.Config)
    for option, value in given.items():
        key = f"layers.mixers.{name}.{option}"
        if option not in types:
            raise ValueError(f"{key}: no such option{nearest(option, types)}; {mixer.name} has {', '.join(types)}")
        allowed = typing.get_args(types[option]) or (types[option],)
        # A whole number is a fine float; a bool is not a fine int.
        fits = any(type(value) is kind or (kind is float and type(value) is int) for kind in allowed)
        if not fits:
            raise ValueError(f"{key}: got {value!r}, expected {type_name(types[option])}")
    return dataclasses.replace(mixer.Config(), **given)


def _whole(value: Any) -> bool:
    return type(value) is int


def _shown(mapping: Mapping[str, Any]) -> str:
    """A mapping as the recipe writes it."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in mapping.items()) + "}"
