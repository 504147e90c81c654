"""Bytes for each token that each layer's mixer holds: counted for softmax attention, tried for all others.

A mixer's tensors are its own affair, and a new one is one file that no planner knows. So each runs once, forward and
backward, on a pretended device in a process of its own (`longtrain.dry_run.mixers`): some seconds for all mixers of a
recipe, kept for the plans that follow, of other lengths too.
"""

import dataclasses
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from longtrain.dry_run import MixerHeld
from longtrain.dry_run.process import printed
from longtrain.layers.pattern import Layer, takes_strategy
from longtrain.parallel.attention.cost import hardware_of
from longtrain.planning.sizes import Sizes

SECONDS = 600.0  # for the mixers of a recipe; they take about ten


@dataclass(frozen=True)
class Mixing(MixerHeld):
    """Bytes for each token of a rank."""

    held: float = 0.0  # keys and values that a ring held last, where nothing is recomputed; else among the results


_NOTHING = Mixing(results=0, remembered=0, kept=0, input=0, working=0, ring=0, kept_results=0)


def mixing(sizes: Sizes) -> list[Mixing]:
    """Of each layer."""
    keys = [None if _counted(sizes, layer) else _key(sizes, index) for index, layer in enumerate(sizes.layers)]
    found = _found(sizes, keys, blocks=False)
    return [_attention(sizes, x) if key is None else found[key] for x, key in zip(sizes.layers, keys, strict=True)]


def blocks(sizes: Sizes) -> list[Mixing]:
    """Of each layer's whole block where a list of operators is kept of it, which may come from anywhere in it."""
    policies = [sizes.policy(index) for index in range(len(sizes.layers))]
    keys = [None if isinstance(x, str) else (_key(sizes, n), tuple(x)) for n, x in enumerate(policies)]
    found = _found(sizes, keys, blocks=True)
    return [_NOTHING if key is None else found[key] for key in keys]


# ---- counted --------------------------------------------------------------------------------------------------------


def _counted(sizes: Sizes, layer: Layer) -> bool:
    """Whether a layer is softmax attention that keeps what such layers keep, as a ring."""
    plain = layer.mixer.name in ("softmax", "sliding_window") and layer.options.pamm is None
    return plain and _strategy(sizes, layer) in (None, "ring")


def _strategy(sizes: Sizes, layer: Layer) -> str | None:
    """How a layer that attends runs on these ranks: what "auto" takes there; None where there is nothing to choose."""
    options, world = layer.options, sizes.degrees[1]
    if world == 1 or not takes_strategy(layer.mixer) or not hasattr(options, "groups"):
        return None  # keys that stand for chunks of tokens are few, however they travel
    if options.strategy not in ("auto", "mesh"):
        return options.strategy
    hardware = hardware_of("cpu" if sizes.devices.device.architecture is None else "cuda")
    return "mesh" if options.strategy == "mesh" else sizes.estimates(layer, hardware)[0].strategy


def _attention(sizes: Sizes, layer: Layer) -> Mixing:
    """Exact: q and out, k and v, and k before it was turned."""
    options, size = layer.options, sizes.size
    width = options.key_width(layer.place.width)
    kept = size * width * (2 * options.heads + 3 * options.groups)
    results = size * options.heads * width + 4 * options.heads  # out and lse
    return Mixing(
        results=results,
        remembered=results,
        held=0.0 if sizes.degrees[1] == 1 else 2.0 * size * options.groups * width,
        kept=kept,
        input=size * layer.place.width,
        working=kept + size * options.heads * width,  # dout
        ring=_ring(sizes, layer),
        kept_results=results,
    )


def _ring(sizes: Sizes, layer: Layer) -> float:
    """What attention over ranks holds inside its backward: float32 running gradients, and what travels."""
    options = layer.options
    width = options.key_width(layer.place.width)
    at_once = min(options.heads_at_once or options.groups, options.groups)
    share = at_once / options.groups
    queries, grouped = options.heads * width * share, at_once * width
    own = 4.0 * (3 * queries + 2 * grouped)  # out, dout, dq; dk, dv
    narrow = 0 if sizes.size == 4 else sizes.size
    results = narrow * (queries + 2 * grouped)
    kernels = narrow * (queries + grouped) + 8.0 * options.heads * share  # dout and v for them, delta and exponents
    if sizes.degrees[1] > 1:  # two blocks of keys and values, and their gradients: made, sent and received
        rings = 1 if sizes.recipe.parallel.rows == 1 else 2  # the outer ring's are under way beside the inner one's
        kernels += rings * 2.0 * grouped * (2 * sizes.size + 12)
    if share == 1:
        return own + max(results, kernels)
    # Copies of the group's keys and values; the results of all groups, whole from the start.
    return own + kernels + narrow * 2 * grouped + (sizes.size * (queries + 2 * grouped)) / share


# ---- tried ----------------------------------------------------------------------------------------------------------


def _found(sizes: Sizes, keys: Sequence[Hashable], *, blocks: bool) -> dict[Hashable, Mixing]:
    """What each of the keys, one for each layer, stands for; None for what is not asked."""
    tried = [key for key in dict.fromkeys(keys) if key is not None]
    if not tried:
        return {}
    return dict(zip(tried, _tried(_asked(sizes, [keys.index(key) for key in tried], blocks=blocks)), strict=True))


def _key(sizes: Sizes, index: int) -> Hashable:
    """What tells a layer's mixer from those that hold something else.

    Layers of one kind differ in constants, but for the first, which may have more to do.
    """
    layer = sizes.layers[index]
    takes = layer.mixer.takes_shared(layer.options)
    before = sizes.layers[index - 1].name if takes else None
    return layer.name, index == 0, before


def _asked(sizes: Sizes, indices: list[int], *, blocks: bool) -> str:
    mixers, strategies, recipe = [], [], sizes.recipe
    for index in indices:
        layer, before = sizes.layers[index], sizes.layers[index - 1]
        strategies.append(_strategy(sizes, layer))
        chosen = {} if strategies[-1] is None else {"strategy": strategies[-1]}
        takes = layer.mixer.takes_shared(layer.options)
        mixers.append(
            {
                "name": layer.mixer.name,
                "options": dataclasses.asdict(layer.options) | chosen,
                "place": dataclasses.asdict(layer.place),
                "before": [before.mixer.name, dataclasses.asdict(before.options)] if takes else None,
                "block": {
                    "hidden": recipe.model.hidden,
                    "tile": recipe.memory.tile,
                    "recompute": list(sizes.policy(index)),
                }
                if blocks
                else None,
            }
        )
    asked = {
        # More ranks hold more summaries of runs, which are small. Blocks' may be rings, whose keys travel from 3 on;
        # what is gathered grows with the ranks.
        "world": min(sizes.degrees[1], 4 if blocks else 2) if set(strategies) <= {None, "ring"} else sizes.degrees[1],
        "architecture": sizes.devices.device.architecture,
        "dtype": "bfloat16" if sizes.size == 2 else "float32",
        # Both keep long runs, and mixers hold the same on them.
        "layout": recipe.parallel.layout.replace("contiguous", "zigzag"),
        "mixers": mixers,
    }
    return json.dumps(asked, sort_keys=True)


@lru_cache(maxsize=256)
def _tried(asked: str) -> tuple[Mixing, ...]:
    line = printed("longtrain.dry_run.mixers", [asked], what="the mixers", timeout=SECONDS)
    return tuple(Mixing(**each) for each in json.loads(line))
