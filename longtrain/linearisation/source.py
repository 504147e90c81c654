"""Which weights of a trained run a model starts from: looked at when a recipe is read, loaded when a run begins."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longtrain import checkpoint
from longtrain.errors import UsageError
from longtrain.layers.mixers import MIXERS, Mixer
from longtrain.layers.pattern import Layer
from longtrain.model import Decoder, ModelConfig

WAYS = ("strategy", "scan_strategy", "heads_at_once", "layout", "pamm")
"""Options that say how a mixer computes, and not what."""


@dataclass(frozen=True)
class Source:
    """A trained run, as its folder has it."""

    checkpoint: Path
    folder: Path
    model: ModelConfig
    layers: tuple[Layer, ...]
    vocabulary: int


def check_source(source: Source, *, model: ModelConfig, layers: Sequence[Layer], vocabulary: int) -> None:
    """Refuse, with a `UsageError`, a model that cannot start from a run's weights, naming key and what would work."""
    for name in ("width", "depth", "hidden", "tie_embedding", "norm_eps", "meta_tokens"):
        own, theirs, key = getattr(model, name), getattr(source.model, name), name.replace("hidden", "mlp_width")
        if own != theirs:
            raise UsageError(
                f"model.{key}: got {own}, but linearise.from={source.folder} has {theirs}; model.{key}="
                f"{str(theirs).lower()} would work"
            )
    if vocabulary != source.vocabulary:
        fits = f"model.vocabulary={source.vocabulary}" if source.vocabulary > vocabulary else "the data of that run"
        raise UsageError(
            f"model.vocabulary: got {vocabulary} token ids, but linearise.from={source.folder} has "
            f"{source.vocabulary}; {fits} would work"
        )
    for own, theirs in zip(layers, source.layers, strict=True):
        _check_layer(source, own, theirs)


def differing(source: Source, layers: Sequence[Layer]) -> list[int]:
    """The layers whose mixers are not the run's."""
    pairs = zip(layers, source.layers, strict=True)
    return [own.place.index for own, theirs in pairs if not _is_same(own, theirs)]


def load_weights(model: Decoder, source: Source, layers: Sequence[Layer]) -> None:
    """Write a run's weights into a model, those of its mixers that have a place there too.

    Raises:
        UsageError: a damaged checkpoint, or one without a weight that is not a new mixer's own.
    """
    found = _read(source, prefix="model.")
    held = {name.removeprefix("model."): tensor for name, tensor in found.items()}
    start = {name: tensor for name, tensor in held.items() if ".mixer." not in name}
    allowed: set[str] = set()
    for own, theirs in zip(layers, source.layers, strict=True):
        prefix = f"blocks.{own.place.index}.mixer."
        start |= {prefix + name: held[prefix + other] for name, other in _taken(own, theirs)}
        if not _is_same(own, theirs):
            allowed |= {name for name, _ in model.named_parameters() if name.startswith(prefix)}
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lacking = sorted(wanted - start.keys() - allowed)
    if lacking:
        raise UsageError(f"linearise.from: {source.folder} has no {', '.join(lacking[:3])}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])


def teachers(source: Source, layers: Sequence[Layer]) -> dict[int, Mixer]:
    """The run's mixers, with their weights, of the layers where this model has others."""
    made: dict[int, Mixer] = {}
    for index in differing(source, layers):
        layer, prefix = source.layers[index], f"model.blocks.{index}.mixer."
        mixer = layer.mixer(_anyway(layer.options), layer.place)
        held = _read(source, prefix=prefix)
        mixer.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in held.items()}, strict=False)
        made[index] = mixer
    return made


def _read(source: Source, *, prefix: str) -> dict[str, torch.Tensor]:
    try:
        return checkpoint.read_tensors(source.checkpoint, prefix=prefix)
    except UsageError as error:
        told = str(error).partition("; remove ")[0]  # which is advice for a run that goes on
        raise UsageError(f"linearise.from: {told}; a run whose checkpoint is whole would work") from error


def _check_layer(source: Source, own: Layer, theirs: Layer) -> None:
    if _is_same(own, theirs):
        return
    index, what, old = own.place.index, own.mixer.name, theirs.mixer.name
    takes = own.mixer.takes_from.get(old)
    here = f"linearise.from={source.folder} has {old} in layer {index}"
    if takes is None:
        able = sorted(name for name, mixer in MIXERS.items() if old in mixer.takes_from and name != old)
        others = f"{', '.join(able)} would work there, or " if able else ""
        raise UsageError(
            f"layers.pattern: got {what}, which takes no weights of {old}, and {here}; {others}{old} with its options"
        )
    new, trained = _on_meta(own), _on_meta(theirs)
    for attribute, option in takes.same.items():
        mine, other = getattr(new, attribute), getattr(trained, attribute)
        if mine != other:
            key = f"layers.mixers.{own.name}.{option}"
            raise UsageError(f"{key}: got {mine}, but {here}, with {other}; {key}={other} would work")
    mine, other = dict(new.named_parameters()), dict(trained.named_parameters())
    taken = dict(_taken(own, theirs))
    lost = sorted(other.keys() - set(taken.values()))
    if lost:
        raise UsageError(f"layers.pattern: got {what}, which has no place for {', '.join(lost)}, and {here} with that")
    for name, from_ in taken.items():
        if name not in mine or from_ not in other or mine[name].shape != other[from_].shape:
            shapes = [list(held[key].shape) if key in held else "none" for held, key in ((mine, name), (other, from_))]
            raise UsageError(
                f"layers.mixers.{own.name}: its {name} is {shapes[0]}, but {here}, whose {from_} is {shapes[1]}; "
                f"{old}'s own options would work"
            )


def _taken(own: Layer, theirs: Layer) -> Iterator[tuple[str, str]]:
    """Names of a layer's own parameters and of those of the trained one that they take."""
    mine, other = (dict(_on_meta(layer).named_parameters()) for layer in (own, theirs))
    if _is_same(own, theirs):
        yield from ((name, name) for name in other)
        return
    for name, from_ in own.mixer.takes_from[theirs.mixer.name].weights.items():
        if name in mine or from_ in other:
            yield name, from_


def _is_same(own: Layer, theirs: Layer) -> bool:
    return own.mixer is theirs.mixer and _anyway(own.options) == _anyway(theirs.options)


def _anyway(options: Any) -> Any:
    """A mixer's options with those that say how it computes at their defaults."""
    ways = {option.name: option.default for option in dataclasses.fields(options) if option.name in WAYS}
    return dataclasses.replace(options, **ways)


def _on_meta(layer: Layer) -> nn.Module:
    with torch.device("meta"):
        return layer.mixer(layer.options, layer.place)
