"""Mutations of the hybrid architectures: one for each mechanism of a layer."""

from tests.mutated.mutation import Mutation

MIXERS = "tests/layers/test_mixers.py::"


def loop(world: int, name: str, number: int = 0) -> str:
    """The test that compares a mixer with its paper's loop."""
    return f"{MIXERS}test_is_the_papers_loop_on_any_number_of_ranks[{world}-{name}-{number}]"


CHUNKS, RAT = "longtrain/layers/chunks.py", "longtrain/layers/mixers/rat.py"
GRID = "tests/layers/test_chunks.py::test_every_rank_holds_whole_chunks"

MUTATIONS = (
    Mutation(
        "chunks-cut-where-ranks-are",
        CHUNKS,
        "start = int(offsets[document]) + number * self.length",
        "start = position",
        (GRID,),
    ),
    Mutation(
        "rat-own-mean-left-out", RAT, "torch.sigmoid(own - lse)", "torch.sigmoid(own - lse - 9)", (loop(1, "rat"),)
    ),
    Mutation(
        "rat-chunks-number-forgotten",
        RAT,
        "turned = rotate(q, numbers, base=self.rope_base)",
        "turned = q",
        (loop(1, "rat"),),
    ),
    Mutation(
        "rat-keys-not-gated",
        RAT,
        "keep = torch.cat((keep, keep), -1)",
        "keep = torch.cat((keep * 0, keep), -1)",
        (loop(1, "rat"),),
    ),
)
