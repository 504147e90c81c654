"""Recall tasks against an account read off the tokens, and accuracy against a count made one sequence at a time."""

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.config import compose
from longtrain.data import (
    BOUNDARY,
    IGNORE,
    CopySequences,
    DataConfig,
    GeneratedSequences,
    MqarSequences,
    PasskeySequences,
    build_data,
    decode,
    vocabulary_of,
)
from longtrain.launch.benchmark_recall import PICTURE, RECIPES
from longtrain.parallel import SequenceShard, build_mesh
from longtrain.recipe import degrees
from longtrain.train import Processes, build_trainer
from tests.distributed import run_command, run_distributed

# ---- multi-query associative recall ----


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), most=st.integers(1, 12), room=st.integers(0, 40), spare=st.integers(0, 9), seed=st.integers(0, 3)
)
def test_every_queried_key_was_given_one_value_and_its_label_is_that(
    data: st.DataObject, most: int, room: int, spare: int, seed: int
) -> None:
    pairs = sorted({most, *data.draw(st.lists(st.integers(1, most), max_size=3))})
    length, vocabulary = 4 * most + room, 2 * most + 2 + spare
    sequences = MqarSequences(length, pairs=pairs, vocabulary=vocabulary, seed=seed)
    for index in range(2 * len(pairs)):
        count = pairs[index % len(pairs)]
        assert sequences.groups[sequences.group(index)] == count
        made = sequences.sequence(index)
        tokens, labels = made.tokens.tolist(), made.labels.tolist()
        assert len(tokens) == len(labels) == length and made.cu_seqlens.tolist() == [0, length]
        assert all(0 <= token < vocabulary for token in tokens)
        given_values: dict[int, list[int]] = {}
        for place in range(0, 2 * count, 2):
            given_values.setdefault(tokens[place], []).append(tokens[place + 1])
            assert labels[place] == labels[place + 1] == IGNORE
        assert len(given_values) == count and len({value for [value] in given_values.values()}) == count
        assert max(given_values) < vocabulary // 2 <= min(value for [value] in given_values.values())
        asked = []
        for token, label in zip(tokens[2 * count :], labels[2 * count :], strict=True):
            if label == IGNORE:
                assert token == 0
            else:
                asked.append(token)
                assert given_values[token] == [label]
        assert sorted(asked) == sorted(given_values)


def test_distances_of_queries_fall_by_a_power_law() -> None:
    count, places = 6000, 15
    sequences = MqarSequences(2 + 2 * places, pairs=[1], vocabulary=8, seed=0)
    seen = np.zeros(places)
    for index in range(count):
        seen[(int(np.flatnonzero(sequences.sequence(index).labels != IGNORE)[0]) - 2) // 2] += 1
    chance = np.arange(1, places + 1) ** -0.99
    chance /= chance.sum()
    assert np.all(np.abs(seen - count * chance) < 5 * np.sqrt(count * chance * (1 - chance)))


# ---- passkey and copy ----


@pytest.mark.parametrize("digits", [1, 5])
@pytest.mark.parametrize("length", [102, 150, 1000])
@pytest.mark.parametrize("depth", [None, 0.0, 0.4, 1.0])
def test_the_passkey_is_in_the_text_once_at_its_depth_and_asked_for_at_the_end(
    digits: int, length: int, depth: float | None
) -> None:
    sequences = PasskeySequences(length, digits=digits, depth=depth, seed=1)
    places = []
    for index in range(20):
        made = sequences.sequence(index)
        assert made.tokens[0] == BOUNDARY and len(made.tokens) == len(made.labels) == length
        key = decode(made.labels[-digits:])
        assert key.isdigit() and set(made.labels[:-digits].tolist()) == {IGNORE}
        text = decode(made.tokens) + key[-1]  # the last label is the one token that no input has
        hidden = f"The pass key is {key}. Remember it. {key} is the pass key. "
        question = f"What is the pass key? The pass key is {key}"
        assert text.count(hidden) == 1 and text.endswith(question)
        place = text.index(hidden)
        filler = text[:place] + text[place + len(hidden) : -len(question)]
        assert place == 0 or text[place - 2 : place] == ". "
        assert not set(filler) & set("0123456789")
        if depth is not None and filler:
            # At the first start of a sentence from there on, and no sentence is longer than 24 letters.
            assert 0 <= place - depth * len(filler) <= 24
        places.append(place / max(len(filler), 1))
    if depth is None and length == 1000:
        assert min(places) < 0.25 < 0.75 < max(places)


@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize(("length", "items"), [(2, 1), (40, 16), (32, 16), (97, 5)])
def test_what_stands_before_the_delimiter_is_to_be_said_again(length: int, items: int, selective: bool) -> None:
    sequences = CopySequences(length, items=items, selective=selective, vocabulary=9, seed=2)
    scattered = False
    for index in range(10):
        made = sequences.sequence(index)
        delimiter = made.tokens.tolist().index(1)
        before = made.tokens[:delimiter]
        answers = made.labels[delimiter:]
        assert before[before != 0].tolist() == answers.tolist() and len(answers) == items
        assert made.tokens[delimiter + 1 :].tolist() == answers[:-1].tolist()
        assert set(made.labels[:delimiter].tolist()) == {IGNORE} and answers.min() >= 2 and answers.max() < 9
        scattered |= bool(np.any(before[:items] == 0))
    assert scattered == (selective and length > 2 * items)


# ---- streams ----

TASKS = [
    DataConfig(source="mqar", length=32, pairs=[2, 4], vocabulary=20),
    DataConfig(source="passkey", length=160, digits=5),
    DataConfig(source="copy", length=24, items=8, selective=True, vocabulary=12),
]


@pytest.mark.parametrize("config", TASKS, ids=lambda config: config.source)
def test_a_sequence_depends_on_seed_and_index_alone_and_held_out_ones_on_no_seed(config: DataConfig) -> None:
    def first(sequences: object, count: int = 60) -> list[bytes]:
        assert isinstance(sequences, GeneratedSequences)
        made = [sequences.sequence(index) for index in reversed(range(count))][::-1]
        return [sequence.tokens.tobytes() + sequence.labels.tobytes() for sequence in made]

    (training, held_out), (again, _), (other, same_held_out) = (build_data(config, seed=seed) for seed in (0, 0, 1))
    assert first(training) == first(again)
    assert first(held_out) == first(same_held_out)
    assert len({*first(training), *first(other), *first(held_out)}) == 180
    assert len({training.fingerprint, other.fingerprint, held_out.fingerprint}) == 3
    assert training.fingerprint == again.fingerprint
    assert training.vocabulary == vocabulary_of(config)


def test_the_random_numbers_are_the_same_in_every_version_of_numpy() -> None:
    # A checkpoint's data position means these sequences. If this fails, old checkpoints resume on other data.
    tokens = MqarSequences(16, pairs=[3], vocabulary=16, seed=1).sequence(2).tokens.tolist()
    assert tokens == [5, 13, 3, 9, 7, 12, 0, 0, 7, 0, 3, 0, 5, 0, 0, 0]
    assert decode(PasskeySequences(120, digits=9, depth=None, seed=1).sequence(2).labels[-9:]) == "676070653"


# ---- through the trainer ----

SMALL = [
    "data=mqar",
    "data.length=32",
    "data.pairs=[2,4,5]",
    "data.vocabulary=16",
    "model.width=16",
    "model.depth=2",
    "layers.pattern=[lightning,softmax]",
    "trainer.sequences=6",
    "schedule.warmup=0",
    "optimizer.name=sgd",  # AdamW's first steps make rounding as large as the gradients that it stands beside
    "optimizer.learning_rate=3.0",  # in three steps, enough to be right now and then
]


def trained(rank: int, world: int, overrides: Sequence[str]) -> dict[str, object]:
    """Losses of three steps, an evaluation, and what a trainer restored after two steps takes as its third."""
    recipe = compose("base", [*SMALL, f"launch.processes={world}", *overrides])
    data, sequence = degrees(recipe, world)
    processes = Processes(rank, world, build_mesh("cpu", data=data, sequence=sequence), torch.device("cpu"))
    training, held_out = build_data(recipe.data, seed=recipe.seed)
    trainer = build_trainer(recipe, processes, training)
    losses = [trainer.train_step().loss for _ in range(2)]
    numbers = trainer.numbers()
    third = trainer._micro_batches()  # what the running trainer goes on with
    trainer._next = None
    losses.append(trainer.train_step().loss)
    resumed = build_trainer(recipe, processes, training)
    resumed.restore(numbers)
    for one, other in zip(third, resumed._micro_batches(), strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.labels, other.labels)
    found = trainer.evaluate(held_out, 11)
    batch = trainer.micro_batch(held_out, [0, 1, 2])
    whole = [batch.shard.gather(part, dim=1) for part in (batch.tokens, batch.labels)]
    expected = [held_out.sequence(index) for index in range(3)]
    assert whole[0][0].tolist() == [token for made in expected for token in made.tokens.tolist()]
    assert whole[1][0].tolist() == [label for made in expected for label in made.labels.tolist()]
    if world == 1:
        counted(trainer.model, held_out, found.accuracy_by_group, found.accuracy)
    for one in (trainer, resumed):
        one.close()
    return {"losses": losses, "loss": found.loss, "accuracy": found.accuracy, "by_group": found.accuracy_by_group}


def counted(model: torch.nn.Module, held_out: object, by_group: dict[int, float], accuracy: float) -> None:
    """Accuracy is what one gets by asking one sequence after the other."""
    assert isinstance(held_out, MqarSequences)
    right: dict[int, list[bool]] = {2: [], 4: [], 5: []}
    for index in range(11):
        made = held_out.sequence(index)
        with torch.no_grad():
            logits = model(torch.from_numpy(made.tokens)[None], SequenceShard(length=32))[0]
        there = np.flatnonzero(made.labels != IGNORE)
        assert len(there) == (2, 4, 5)[index % 3]
        right[len(there)] += (logits[there].argmax(-1).numpy() == made.labels[there]).tolist()
    assert by_group == {count: pytest.approx(np.mean(hits)) for count, hits in right.items()}
    assert accuracy == pytest.approx(np.mean(sum(right.values(), [])))
    assert 0 < accuracy < 1  # or it would say little


@cache
def alone() -> dict[str, object]:
    return run_distributed(1, trained, [])[0]


@pytest.mark.parametrize(
    "spread", [["parallel.sequence=2", "parallel.layout=zigzag"], ["parallel.data=2", "trainer.accumulation=3"]]
)
def test_losses_accuracy_and_resumed_batches_are_the_same_on_any_number_of_ranks(spread: list[str]) -> None:
    expected = alone()
    for found in run_distributed(2, trained, spread):
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5, atol=0)  # type: ignore[arg-type]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert (found["accuracy"], found["by_group"]) == (expected["accuracy"], expected["by_group"])


# ---- what a model can recall ----

FEW_PAIRS = [
    "data.length=24",
    "data.pairs=[6]",
    "data.vocabulary=32",
    "model.width=32",
    "model.mlp_width=32",
    "model.depth=2",
    "trainer.steps=130",
    "schedule.warmup=5",
    "schedule.decay=65",
    "optimizer.matrix_learning_rate=0.05",
    "optimizer.learning_rate=3.0e-2",
]


def recalled(rank: int, world: int, overrides: Sequence[str]) -> float:
    """The share of held-out answers that are right after training on few pairs."""
    recipe = compose("recall_linear", [*FEW_PAIRS, *overrides])
    processes = Processes(rank, world, build_mesh("cpu", data=1, sequence=1), torch.device("cpu"))
    training, held_out = build_data(recipe.data, seed=recipe.seed)
    trainer = build_trainer(recipe, processes, training)
    for _ in range(recipe.trainer.steps):
        trainer.train_step()
    found = trainer.evaluate(held_out, 128).accuracy  # of 768 answers
    trainer.close()
    return found


@pytest.mark.timeout(600)
def test_a_small_hybrid_recalls_99_per_cent_where_fixed_decay_alone_does_not() -> None:
    [alone] = run_distributed(1, recalled, [], timeout=250)
    [hybrid] = run_distributed(1, recalled, ["layers.pattern=[lightning, softmax]"], timeout=250)
    assert alone < 0.5 < 0.99 <= hybrid
    assert alone > 1 / 31  # it does learn: better than any key or value


@pytest.mark.full
@pytest.mark.timeout(3600)  # minutes where it is quiet; time decides nothing
def test_the_recipes_recall_99_per_cent_but_for_fixed_decay_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "longtrain", "bench", "recall", "--output", "out"]
    ended = run_command(command, cwd=tmp_path, timeout=3500, env={"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout
    found = {
        name: json.loads((tmp_path / "out" / name / "summary.json").read_text())["held_out_accuracy_by_pairs"]
        for name in RECIPES
    }
    assert all(len(by_pairs) == 4 for by_pairs in found.values())
    assert min(found["recall_hybrid"].values()) >= 0.99 and min(found["recall_softmax"].values()) >= 0.99
    assert found["recall_linear"]["16"] < 0.5
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
