"""A recipe on so many devices: the numbers that plans start from."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from longtrain.layers.pattern import Layer, with_strategy
from longtrain.parallel import SequenceShard
from longtrain.parallel.attention.choice import possible
from longtrain.parallel.attention.cost import Estimate, Hardware, Heads, estimates
from longtrain.planning.devices import Devices
from longtrain.recipe import Recipe, degrees, model_vocabulary, recipe_layers


@dataclass(frozen=True)
class Sizes:
    """What the recipe and the devices say, before anything is worked out; see `longtrain.planning.work.Shape`."""

    recipe: Recipe
    devices: Devices
    cu_seqlens: np.ndarray  # of a micro-batch

    @cached_property
    def degrees(self) -> tuple[int, int]:
        """(data, sequence)."""
        return degrees(self.recipe, self.devices.count)

    @cached_property
    def layers(self) -> list[Layer]:
        recipe = self.recipe
        layers = with_strategy(recipe.layers, recipe.parallel.strategy, heads_at_once=recipe.memory.attention_heads)
        return recipe_layers(recipe, layers)

    @property
    def packed(self) -> int:
        """Tokens of a micro-batch, over the ranks that share it."""
        return int(self.cu_seqlens[-1])

    @cached_property
    def shard(self) -> SequenceShard:
        parallel, sequence = self.recipe.parallel, self.degrees[1]
        return SequenceShard.pretend(
            self.packed,
            rank=0,
            world=sequence,
            layout=parallel.layout,
            cu_seqlens=self.cu_seqlens,
            rows=parallel.rows,
        )

    def estimates(self, layer: Layer, hardware: Hardware) -> list[Estimate]:
        """What each strategy that the layer's attention may take costs on such hardware, the shortest first."""
        options = layer.options
        width, window = options.key_width(layer.place.width), getattr(options, "window", None)
        at_once = getattr(options, "heads_at_once", None)
        heads = Heads(1, options.heads, options.groups, width, width, self.size, at_once)
        window = None if window is None else (window, 0)
        found = estimates(self.shard, self.shard, heads, causal=True, window=window, hardware=hardware)
        return possible(found, options.strategy, None, ranks=self.shard.world) or found

    @cached_property
    def vocabulary(self) -> int:
        return model_vocabulary(self.recipe)

    @property
    def size(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.recipe.trainer.precision == "bfloat16" else 4

    def policy(self, index: int) -> Any:
        """What the recipe's ``memory.recompute`` says of a layer."""
        given: Any = self.recipe.memory.recompute
        return given.get(self.layers[index].name, given.get("default", "none")) if isinstance(given, dict) else given
