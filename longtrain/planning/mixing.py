"""Bytes that each layer's mixer holds, over the tokens of a rank: counted for softmax attention, tried for all others.

A mixer's tensors are its own affair, and a new one is one file that no planner knows. So each runs once, forward and
backward, on a pretended device in a process of its own (`longtrain.dry_run.mixers`): some seconds for all mixers of a
recipe, kept for the plans that follow, of other lengths too.
"""

import dataclasses
import json
from collections.abc import Hashable, Sequence
from functools import lru_cache

from longtrain.dry_run import MixerHeld
from longtrain.dry_run.process import printed
from longtrain.layers.pattern import Layer, hands_on, takes_strategy
from longtrain.parallel.attention.cost import hardware_of
from longtrain.parallel.attention.relaying import AUTO, BALANCED, HOME, attention_shard
from longtrain.planning.sizes import Sizes, window_of

SECONDS = 600.0  # for the mixers of a recipe; they take about ten


_Pass = tuple[int, MixerHeld]  # tokens of a rank, and bytes
_NOTHING = MixerHeld(*[0.0] * len(dataclasses.fields(MixerHeld)))


def mixing(sizes: Sizes) -> list[MixerHeld]:
    """Of each layer; as if it kept everything where a list of operators is kept."""
    keys = [None if _counted(sizes, layer) else _key(sizes, index) for index, layer in enumerate(sizes.layers)]
    found = _found(sizes, keys, blocks=False)
    return [_attention(sizes, n) if key is None else found[key] for n, key in enumerate(keys)]


def blocks(sizes: Sizes) -> list[MixerHeld]:
    """Of each layer's whole block where a list of operators is kept of it, which may come from anywhere in it."""
    policies = [sizes.policy(index) for index in range(len(sizes.layers))]
    keys = [None if isinstance(policy, str) else _key(sizes, index) for index, policy in enumerate(policies)]
    found = _found(sizes, keys, blocks=True)
    return [_NOTHING if key is None else found[key] for key in keys]


# ---- counted --------------------------------------------------------------------------------------------------------


def _counted(sizes: Sizes, layer: Layer) -> bool:
    """Whether a layer is softmax attention that keeps what such layers keep, as a ring of whole blocks at home."""
    if layer.mixer.name not in ("softmax", "sliding_window") or layer.options.pamm is not None:
        return False
    ways = _ways(sizes, layer)
    at_home = ways.get("layout", HOME) == HOME
    return not ways or (ways["strategy"] == "ring" and at_home and layer.options.window is None)


def _ways(sizes: Sizes, layer: Layer) -> dict[str, str]:
    """Options of a layer that attends, as "auto" has them on these ranks; none where there is nothing to choose."""
    options, world = layer.options, sizes.degrees[1]
    if world == 1 or not takes_strategy(layer.mixer) or not hasattr(options, "groups"):
        return {}  # keys that stand for chunks of tokens are few, however they travel
    kind = "cpu" if sizes.devices.device.architecture is None else "cuda"
    shard, ways = sizes.first_shard, {}
    if (layout := getattr(options, "layout", None)) is not None:
        given = {"strategy": options.strategy, "window": window_of(layer)}
        there = attention_shard(shard, sizes.heads(layer), device=kind, layout=layout, **given)
        ways["layout"] = HOME if there is shard else BALANCED if layout == AUTO else layout
        shard = there
    if options.strategy == "auto":
        return ways | {"strategy": sizes.estimates(layer, shard, hardware_of(kind))[0].strategy}
    return ways | {"strategy": options.strategy}


def _attention(sizes: Sizes, index: int) -> MixerHeld:
    """Exact: q and out, k and v, and k before it was turned."""
    layer, size, policy = sizes.layers[index], sizes.size, _policy(sizes, index)
    options = layer.options
    width = options.key_width(layer.place.width)
    kept, x = size * width * (2 * options.heads + 3 * options.groups), size * layer.place.width
    results = size * options.heads * width + 4 * options.heads  # out and lse
    if policy == "none" and sizes.degrees[1] > 1:  # keys and values that a ring held last
        results += 2.0 * size * options.groups * width
    return MixerHeld(
        remembered=0.0 if policy == "full" else results,
        between=kept + x if policy == "none" else 0.0,
        results=results,
        kept=kept,
        input=x,
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


def _found(sizes: Sizes, keys: Sequence[Hashable], *, blocks: bool) -> dict[Hashable, MixerHeld]:
    """What each of the keys, one for each layer, stands for; None for what is not asked."""
    tried = [key for key in dict.fromkeys(keys) if key is not None]
    if not tried:
        return {}
    passes = _tried(_asked(sizes, [keys.index(key) for key in tried], blocks=blocks))
    return {key: _for_each_token(sizes.tokens, *each) for key, each in zip(tried, passes, strict=True)}


def _for_each_token(tokens: int, few: _Pass, many: _Pass) -> MixerHeld:
    """With so many tokens, on the line through two passes: what does not grow with the tokens is spread over them."""
    along = (tokens - few[0]) / (many[0] - few[0])
    ends = zip(dataclasses.astuple(few[1]), dataclasses.astuple(many[1]), strict=True)
    return MixerHeld(*(max(0.0, a + along * (b - a)) / tokens for a, b in ends))


def _policy(sizes: Sizes, index: int) -> str:
    """A layer's, for its mixer alone."""
    policy = sizes.policy(index)
    return policy if isinstance(policy, str) else "none"


def _key(sizes: Sizes, index: int) -> Hashable:
    """What tells a layer's mixer from those that hold something else.

    Layers of one kind differ in constants, but for the first, which may have more to do.
    """
    layer = sizes.layers[index]
    takes = layer.mixer.takes_shared(layer.options)
    before = (sizes.layers[index - 1].name, _held_here(sizes, index)) if takes else None
    return layer.name, index == 0, before, hands_on(sizes.layers)[index]


def _held_here(sizes: Sizes, index: int) -> bool:
    """Whether it is the layer's doing that what it takes is still there: layers that keep all keep what they made."""
    before = sizes.layers[index - 1]
    return sizes.policy(index - 1) != "none" and not before.mixer.takes_shared(before.options)


def _asked(sizes: Sizes, indices: list[int], *, blocks: bool) -> str:
    mixers, strategies, recipe = [], set[str](), sizes.recipe
    for index in indices:
        layer, before = sizes.layers[index], sizes.layers[index - 1]
        ways = _ways(sizes, layer)
        strategies.add(ways.get("strategy", "ring"))
        giver = {
            "name": before.mixer.name,
            "options": dataclasses.asdict(before.options),
            "held": _held_here(sizes, index),
        }
        mixers.append(
            {
                "name": layer.mixer.name,
                "options": dataclasses.asdict(layer.options) | ways,
                "place": dataclasses.asdict(layer.place),
                "before": giver if layer.mixer.takes_shared(layer.options) else None,
                "hands_on": hands_on(sizes.layers)[index],
                "recompute": sizes.policy(index) if blocks else _policy(sizes, index),
                "block": {"hidden": recipe.model.hidden, "tile": recipe.memory.tile} if blocks else None,
            }
        )
    asked = {
        # More ranks hold more summaries of runs, which are small. Blocks' may be rings, whose keys travel from 3 on;
        # what is gathered grows with the ranks.
        "world": min(sizes.degrees[1], 4 if blocks else 2) if strategies <= {"ring"} else sizes.degrees[1],
        "architecture": sizes.devices.device.architecture,
        "dtype": "bfloat16" if sizes.size == 2 else "float32",
        # Both keep long runs, and mixers hold the same on them.
        "layout": recipe.parallel.layout.replace("contiguous", "zigzag"),
        "mixers": mixers,
    }
    return json.dumps(asked, sort_keys=True)


@lru_cache(maxsize=256)
def _tried(asked: str) -> tuple[tuple[_Pass, _Pass], ...]:
    line = printed("longtrain.dry_run.mixers", [asked], what="the mixers", timeout=SECONDS)
    found = [[(tokens, MixerHeld(**held)) for tokens, held in passes] for passes in json.loads(line)]
    return tuple((few, many) for few, many in found)
