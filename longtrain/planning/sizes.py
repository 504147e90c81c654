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
from longtrain.planning.documents import first_documents
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
        """Of the documents that are planned with."""
        return self._shard(self.cu_seqlens)

    @cached_property
    def first_shard(self) -> SequenceShard:
        """Of the run's first micro-batch, for which it chooses as for those that follow."""
        return self._shard(first_documents(self.recipe, self.devices))

    def _shard(self, cu_seqlens: np.ndarray) -> SequenceShard:
        parallel, sequence = self.recipe.parallel, self.degrees[1]
        return SequenceShard.pretend(
            self.packed,
            rank=0,
            world=sequence,
            layout=parallel.layout,
            cu_seqlens=cu_seqlens,
            rows=parallel.rows,
        )

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on the rank that holds most, and its copy of the meta tokens."""
        return max(self.shard.lengths) + self.recipe.model.meta_tokens

    def heads(self, layer: Layer) -> Heads:
        """Of a layer that attends."""
        options, width = layer.options, layer.options.key_width(layer.place.width)
        at_once = getattr(options, "heads_at_once", None)
        return Heads(1, options.heads, options.groups, width, width, self.size, at_once)

    def estimates(self, layer: Layer, shard: SequenceShard, hardware: Hardware) -> list[Estimate]:
        """What each strategy that the layer's attention may take costs on such hardware, the shortest first."""
        found = estimates(shard, shard, self.heads(layer), causal=True, window=window_of(layer), hardware=hardware)
        return possible(found, layer.options.strategy, None, ranks=shard.world) or found

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


def window_of(layer: Layer) -> tuple[int, int] | None:
    """What a query of a layer that attends sees."""
    window = getattr(layer.options, "window", None)
    return None if window is None else (window, 0)
