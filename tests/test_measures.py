"""What mixers measure, in a step's metrics: the same however the step is cut, spread or computed again."""

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longtrain.config import compose
from longtrain.data import build_data
from longtrain.measures import Measures
from longtrain.model import Decoder
from longtrain.parallel import SequenceShard, build_mesh
from longtrain.recipe import degrees
from longtrain.train import Processes, build_trainer
from tests.distributed import run_command, run_distributed

SMALL = ["data.length=512", "model.width=32", "model.depth=2", "model.mlp_width=64", "trainer.evaluate_sequences=1"]
NATSL = ["layers.pattern=[natsl]", "layers.mixers={natsl: {heads: 2, chunk: 8}}", "trainer.sequences=2"]
NAME = "natsl.softmax_share"
STEPS = 2


class Counting(nn.Module):
    measures = ("share", "size")

    def __init__(self, name: str, *pairs: tuple[float | Tensor, float | Tensor]) -> None:
        super().__init__()
        self.name, self.measured = name, dict(zip(self.measures, pairs, strict=True))


def test_sums_over_layers_and_passes_by_name() -> None:
    model = nn.ModuleList([Counting("b", (1, 4), (7, 1)), nn.Linear(2, 2), Counting("a", (2, 5), (torch.tensor(3), 1))])
    model.append(Counting("b", (2, 2), (1, 1)))
    measures = Measures(model.modules())
    assert measures.names == ("a.share", "a.size", "b.share", "b.size")
    measures.take()
    measures.take()
    assert measures.sums(torch.device("cpu")).tolist() == [[4, 10], [6, 2], [6, 12], [16, 4]]
    assert not measures.sums(torch.device("cpu")).any()  # of the next step


def test_a_model_without_measures_has_nothing_to_do() -> None:
    measures = Measures(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).modules())
    measures.take()
    assert measures.names == () and measures.sums(torch.device("cpu")).shape == (0, 2)


def steps(rank: int, world: int, overrides: Sequence[str]) -> list[dict[str, float]]:
    recipe = compose("quickstart", [f"launch.processes={world}", *SMALL, *NATSL, *overrides])
    data, sequence = degrees(recipe, world)
    processes = Processes(rank, world, build_mesh("cpu", data=data, sequence=sequence), torch.device("cpu"))
    trainer = build_trainer(recipe, processes, build_data(recipe.data, seed=recipe.seed)[0])
    return [trainer.train_step().measures for _ in range(STEPS)]


def by_hand() -> float:
    """The share in the first layer of the first step, from its weights and the tokens."""
    recipe = compose("quickstart", ["launch.processes=1", *SMALL, *NATSL, "model.depth=1"])
    data, _ = build_data(recipe.data, seed=recipe.seed)
    torch.manual_seed(recipe.seed)
    model = Decoder(recipe.model, recipe.layers, vocabulary=data.vocabulary)
    block, sums = model.blocks[0], torch.zeros(2, dtype=torch.float64)
    for sequence in (data.sequence(0), data.sequence(1)):
        x = block.get_submodule("mixer_norm")(model.embedding(torch.from_numpy(sequence.tokens)))
        bounds = sequence.cu_seqlens.tolist()
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            for first in range(start, stop - 8, 8):
                scores = block.get_parameter("mixer.scores") @ x[first : first + 8].mean(0)
                sums += torch.tensor([int((scores[:, 0] > scores[:, 1]).sum()), 2])
    return float(sums[0] / sums[1])


def test_the_first_steps_share_is_what_weights_and_tokens_say() -> None:
    expected = by_hand()
    assert 0 < expected < 1
    for world in (1, 2):
        for measured in run_distributed(world, steps, ["model.depth=1"]):
            assert measured[0] == {NAME: pytest.approx(expected, abs=1e-12)}


@cache
def alone() -> list[dict[str, float]]:
    return run_distributed(1, steps, [])[0]


@pytest.mark.parametrize(
    ("world", "spread"),
    [
        (1, ["trainer.accumulation=2", "memory.recompute=full"]),
        (2, ["memory.recompute=attention", "parallel.layout=striped:16"]),
        (2, ["parallel.data=2"]),
        (2, ["trainer.accumulation=2", "memory.recompute=full"]),
    ],
)
def test_measures_do_not_depend_on_how_a_step_is_cut_spread_or_computed_again(world: int, spread: list[str]) -> None:
    expected = alone()
    for measured in run_distributed(world, steps, spread):
        assert [step[NAME] for step in measured] == pytest.approx([step[NAME] for step in expected], abs=1e-3)
        assert measured[0] == pytest.approx(expected[0], abs=1e-12)


def test_metrics_have_them(tmp_path: Path) -> None:
    words = [*SMALL, *NATSL, "launch.processes=2", "trainer.steps=2", f"run_dir={tmp_path}"]
    ended = run_command([sys.executable, "-P", "-m", "longtrain", "train", "quickstart", *words], timeout=120)
    assert ended.returncode == 0, ended.stdout
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(0 < record[NAME] < 1 for record in records)


def test_a_shard_without_chunks_to_choose_for_has_no_share() -> None:
    recipe = compose("quickstart", [*SMALL, *NATSL])
    model = Decoder(recipe.model, recipe.layers, vocabulary=9)
    measures = Measures(model.modules())
    model(torch.zeros(1, 8, dtype=torch.int64), SequenceShard(length=8))
    measures.take()
    assert measures.sums(torch.device("cpu")).tolist() == [[0, 0]]
