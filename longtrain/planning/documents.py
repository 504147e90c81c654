"""Which documents a plan counts with.

Time and memory are those of one document a sequence: shorter ones need less time and no more memory. What "auto" takes
among strategies goes by the documents that there are, so that it is asked of the recipe's own first sequences.
"""

from functools import lru_cache

import numpy as np

from longtrain.data import FileDocuments, PackedSequences, text_documents
from longtrain.errors import UsageError
from longtrain.planning.devices import Devices
from longtrain.recipe import Recipe, degrees


def longest_documents(recipe: Recipe, devices: Devices) -> np.ndarray:
    """Boundaries of a micro-batch in which each sequence is one document, the most work that can come."""
    return np.arange(_sequences(recipe, devices) + 1, dtype=np.int64) * recipe.data.length


def first_documents(recipe: Recipe, devices: Devices) -> np.ndarray:
    """Boundaries of the run's first micro-batch.

    Generated sequences are one document each, and text is taken for such where it is not on this machine, or is less
    than one sequence: a plan needs no data.
    """
    data, longest = recipe.data, longest_documents(recipe, devices)
    if data.source not in ("stdlib", "text"):
        return longest
    try:
        text = _text(data.source, data.path, data.held_out)
    except UsageError:
        return longest
    packed = PackedSequences(text, data.length, seed=recipe.seed)
    if len(packed) == 0:
        return longest
    starts = [packed.boundaries(n)[:-1] + n * data.length for n in range(len(longest) - 1)]
    return np.concatenate([*starts, longest[-1:]])


def _sequences(recipe: Recipe, devices: Devices) -> int:
    """Of a micro-batch."""
    data, _ = degrees(recipe, devices.count)
    return max(1, recipe.trainer.sequences // (data * recipe.trainer.accumulation))


@lru_cache(maxsize=4)  # one plan after another, of other lengths, asks for the same files
def _text(source: str, path: str | None, held_out: float) -> FileDocuments:
    return text_documents(source, path, held_out)[0]
