"""The mixers of `longtrain.layers` as they stand in the middle of a model, with their own default options."""

import dataclasses

import torch

from longtrain.bench_mixers.cases import NATURAL, SEED, Case
from longtrain.bench_mixers.operators import SOFTMAX
from longtrain.layers import MIXERS, LayerPlace, Mixer, RecurrentMixer

PLACE = {"index": 1, "depth": 4}  # the second of four layers
NAMES = tuple(MIXERS)


def build(case: Case) -> Mixer:
    """A mixer with H heads where it has heads, and the same weights in every process; a ValueError if it cannot be.

    The weights are in the case's dtype; buffers stay as they are, as they do in training.
    """
    kind = MIXERS[case.name]
    heads = {"heads": case.heads} if "heads" in {field.name for field in dataclasses.fields(kind.Config)} else {}
    config, place = kind.Config(**heads), LayerPlace(width=case.model_width, **PLACE)
    kind.check(config, place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        mixer = kind(config, place)
    for parameter in mixer.parameters():
        parameter.data = parameter.data.to(case.torch_dtype)
    return mixer


def layout_of(case: Case) -> str:
    """The layout of a case: what it says, or what is best for softmax attention and for the others."""
    if case.layout != NATURAL:
        return case.layout
    softmax = case.name == SOFTMAX if case.kind == "operator" else not issubclass(MIXERS[case.name], RecurrentMixer)
    return "zigzag" if softmax else "contiguous"
