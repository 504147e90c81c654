"""Which mixer each layer has: a pattern of names repeated over the depth, and the options of each mixer."""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from typing import Any

from longtrain.layers.mixers import MIXERS, LayerPlace, Mixer


@dataclass(frozen=True)
class LayersConfig:
    """The mixers of a model."""

    pattern: list[str] = field(default_factory=lambda: ["softmax"])
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """`` (nearest: 'x')`` for the known name that looks most like ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r})" if close else ""


def type_name(kind: Any) -> str:
    """A type as a person says it: ``int | None`` is "a whole number or null"."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if typing.get_origin(kind) is list:
        return "a list such as [softmax, lightning]"
    if typing.get_origin(kind) is dict:
        return "a mapping such as {softmax: {heads: 8}}"
    return " or ".join(names.get(part, str(part)) for part in typing.get_args(kind) or (kind,))


def plan_layers(config: LayersConfig, *, width: int, depth: int) -> list[tuple[type[Mixer], Any, LayerPlace]]:
    """Mixer class, its options and its place, for each of ``depth`` layers.

    Raises:
        ValueError: an unknown mixer or option (the nearest name is given), or options that a mixer refuses; the text
            starts with the recipe's key.
    """
    if not config.pattern:
        raise ValueError(f"layers.pattern: got an empty list, it must name one or more of {', '.join(MIXERS)}")
    for name in config.pattern:
        if name not in MIXERS:
            raise ValueError(f"layers.pattern: no mixer {name!r}{nearest(name, MIXERS)}; there are {', '.join(MIXERS)}")
    options = {name: _options(name, given) for name, given in config.mixers.items()}
    layers = []
    for index in range(depth):
        name = config.pattern[index % len(config.pattern)]
        mixer, place = MIXERS[name], LayerPlace(width=width, index=index, depth=depth)
        chosen = options.get(name) or mixer.Config()
        try:
            mixer.check(chosen, place)
        except ValueError as error:
            raise ValueError(f"layers.mixers.{name}.{error}") from None
        layers.append((mixer, chosen, place))
    return layers


def _options(name: str, given: dict[str, Any]) -> Any:
    if name not in MIXERS:
        raise ValueError(f"layers.mixers.{name}: no such mixer{nearest(name, MIXERS)}; there are {', '.join(MIXERS)}")
    kind = MIXERS[name].Config
    types = typing.get_type_hints(kind)
    for option, value in given.items():
        key = f"layers.mixers.{name}.{option}"
        if option not in types:
            raise ValueError(f"{key}: no such option{nearest(option, types)}; {name} has {', '.join(types)}")
        allowed = typing.get_args(types[option]) or (types[option],)
        # A whole number is a fine float; a bool is not a fine int.
        fits = any(type(value) is kind_ or (kind_ is float and type(value) is int) for kind_ in allowed)
        if not fits:
            raise ValueError(f"{key}: got {value!r}, expected {type_name(types[option])}")
    return dataclasses.replace(kind(), **given)
