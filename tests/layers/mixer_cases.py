"""Every mixer in the folder, the options that it is tested with, and the loop over tokens that says what is right.

`references/<name>.py` holds, for the mixer of that name,

    CASES = [{"heads": 4}, {"heads": 2, "some_option": 1}]      # options worth a test each, on a model of width 32

    def reference(mixer: Any, x: Tensor) -> Tensor:
        '''x [T, D], one document -> y [T, D]'''

written from the paper's equations: a Python loop over tokens, with the mixer's weights, in the dtype of x, without any
function of longtrain, and differentiable (nothing in place). Keep a mixer's decays slow, so that what happened long ago
matters: build() draws every parameter anew around its first value.
"""

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longtrain.layers import MIXERS, LayerPlace, Mixer

PLACE = LayerPlace(width=32, index=1, depth=3)
LENGTH = 43
CU_SEQLENS = [0, 1, 9, 9, 30, 43]


def companion(name: str) -> ModuleType | None:
    """The module `references/<name>.py`, or None where there is none."""
    module = f"tests.layers.references.{name}"
    return importlib.import_module(module) if importlib.util.find_spec(module) is not None else None


def options_of(name: str) -> list[dict[str, Any]]:
    module = companion(name)
    return [{}] if module is None else module.CASES


# (mixer, number of its case), for parametrize
CASES = [(name, number) for name in MIXERS for number in range(len(options_of(name)))]


def build(name: str, number: int, *, dtype: torch.dtype = torch.float64) -> Mixer:
    """The mixer with the options of its case; weights, norms and sinks are drawn, so that none is neutral."""
    torch.manual_seed(1)
    mixer = MIXERS[name](MIXERS[name].Config(**options_of(name)[number]), PLACE)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer.to(dtype)


def inputs(*, batch: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x and the gradient of y, [B, T, D]."""
    generator = torch.Generator().manual_seed(2)
    x, dy = torch.randn(2, batch, LENGTH, PLACE.width, dtype=torch.float64, generator=generator).to(dtype)
    return x, dy


@functools.cache
def truth(name: str, number: int) -> list[Tensor]:
    """Output, and gradients of x and of every weight, of the reference on each document alone, in float64."""
    module = companion(name)
    assert module is not None, f"write tests/layers/references/{name}.py; {__file__} says what belongs there"
    mixer = build(name, number)
    x, dy = inputs()
    x.requires_grad_()
    bounds = zip(CU_SEQLENS[:-1], CU_SEQLENS[1:], strict=True)
    y = torch.cat([module.reference(mixer, x[0, a:b]) for a, b in bounds if b > a])[None]
    return [y.detach(), *torch.autograd.grad(y, [x, *mixer.parameters()], dy)]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
