"""Patterns: which mixer each layer gets, from YAML and from the command line, and what is refused in one line."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from longtrain.config import compose, from_mapping, to_yaml
from longtrain.errors import UsageError
from longtrain.layers.pattern import LayersConfig, describe_layers, layer_names, plan_layers, with_strategy

L, S, W = "lightning", "softmax", "sliding_window"

PATTERNS: list[tuple[Any, list[str]]] = [
    (S, [S] * 8),
    ([L, S, L], [L, S, L, L, S, L, L, S]),
    ({L: 3, S: 1}, [L, L, L, S] * 2),
    ({S: 1, L: 3}, [L, L, L, S] * 2),
    ({L: 6, S: 2}, [L, L, L, S] * 2),
    ({S: 1, L: 1}, [S, L] * 4),
    ({L: 5, S: 2, W: 1}, [L, L, S, L, L, L, S, W]),
    ({S: [3, 7], "default": L}, [L, L, L, S] * 2),
    ({S: [-1, 0], "default": L}, [S, L, L, L, L, L, L, S]),
    ({S: "3::4", "default": L}, [L, L, L, S] * 2),
    ({S: "-2:", W: ":2", "default": L}, [W, W, L, L, L, L, S, S]),
    ({S: "::2", L: "1::2"}, [S, L] * 4),
    ({S: "2:5", "default": L}, [L, L, S, S, S, L, L, L]),
]


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS, ids=lambda value: str(value)[:40])
def test_layers_are_where_the_pattern_says_by_yaml_and_by_command_line(
    tmp_path: Path, pattern: Any, expected: list[str]
) -> None:
    assert layer_names(LayersConfig(pattern), 8) == expected
    text = re.sub(r'"(\w+)":', r"\1:", str(pattern).replace("'", '"'))  # Hydra has no quotes around keys
    (tmp_path / "mine.yaml").write_text(f"defaults: [base, _self_]\nlayers: {{pattern: {text}}}\n")
    by_yaml = compose(str(tmp_path / "mine.yaml"))
    assert by_yaml.layers.pattern == pattern
    # Over a list, over a mapping and twice: the last one counts, whole.
    (tmp_path / "other.yaml").write_text(
        "defaults: [base, _self_]\nlayers: {pattern: {softmax: [1], default: lightning}}\n"
    )
    for recipe in ("base", str(tmp_path / "other.yaml")):
        assert compose(recipe, ["layers.pattern=[softmax]", f"layers.pattern={text}"]).layers.pattern == pattern
    assert compose("quickstart", [f"layers.pattern={text}", "model.depth=8"]).layers.pattern == pattern
    assert from_mapping(OmegaConf.create(to_yaml(by_yaml))) == by_yaml  # type: ignore[arg-type]


def test_a_mixers_layers_lie_evenly() -> None:
    for counts in ({L: 3, S: 1}, {L: 7, S: 2, W: 1}, {L: 4, S: 3}, {L: 2, S: 2, W: 3}):
        group = sum(counts.values())
        names = layer_names(LayersConfig(dict(counts)), 3 * group)
        assert names == names[:group] * 3
        for name, count in counts.items():
            assert names[:group].count(name) == count
            places = [index for index, given in enumerate(names) if given == name]
            gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
            assert all(abs(gap - group / count) < len(counts) for gap in gaps), (counts, name, names)


def test_one_mixer_may_have_different_options_in_different_layers() -> None:
    config = LayersConfig(
        {"near": 1, "far": 1}, {"near": {"mixer": S, "window": 8, "heads": 4}, "far": {"mixer": S, "heads": 2}}
    )
    planned = plan_layers(config, width=32, depth=4)
    assert [(kind.name, options.window, options.heads) for kind, options, _ in planned] == [(S, 8, 4), (S, None, 2)] * 2
    spread = plan_layers(with_strategy(config, "ring"), width=32, depth=2)
    assert [options.strategy for _, options, _ in spread] == ["ring", "ring"]
    own = LayersConfig([S, L], {S: {"strategy": "allgather"}})
    assert plan_layers(with_strategy(own, "ring"), width=32, depth=1)[0][1].strategy == "allgather"
    assert plan_layers(with_strategy(LayersConfig(), "ring"), width=32, depth=1)[0][1].strategy == "ring"


@pytest.mark.parametrize(
    ("pattern", "depth", "text"),
    [
        ([L, S, L, L], 4, "lightning softmax lightning lightning"),
        ({L: 3, S: 1}, 8, "3 x lightning softmax"),
        ({S: [5], "default": L}, 6, "5 x lightning softmax"),
        (S, 8, "softmax"),
    ],
)
def test_layers_in_a_few_words(pattern: Any, depth: int, text: str) -> None:
    assert describe_layers(LayersConfig(pattern), depth) == text


REFUSED = [
    ("softmx", "layers.pattern", "'softmx'", "'softmax'"),
    ("[3]", "layers.pattern", "3", "lightning"),
    ("[]", "layers.pattern", "empty list"),
    ("{}", "layers.pattern", "a ratio such as"),
    ("7", "layers.pattern", "7", "a ratio such as"),
    ("null", "layers.pattern", "None", "a name"),
    ("{softmx: 1, lightning: 3}", "layers.pattern", "'softmx'", "'softmax'"),
    ("{softmax: 0, lightning: 4}", "layers.pattern", "softmax: 0", "1 or more"),
    ("{softmax: 1, lightning: 2}", "layers.pattern", "groups of 3", "model.depth = 8", "model.depth=6 or 9"),
    ("{softmax: 1, lightning: 8}", "layers.pattern", "groups of 9", "model.depth=9 would"),
    ("{softmax: [8], default: lightning}", "layers.pattern.softmax", "layer 8", "0 to 7"),
    ("{softmax: [-9], default: lightning}", "layers.pattern.softmax", "layer -9", "0 to 7"),
    ("{softmax: [3, 3], default: lightning}", "layers.pattern.softmax", "layer 3", "already"),
    ("{softmax: [7, -1], default: lightning}", "layers.pattern.softmax", "layer 7", "already"),
    ("{softmax: [3], lightning: '::3'}", "layers.pattern.lightning", "layer 3", "softmax has already"),
    ("{softmax: [3], lightning: ':3'}", "layers.pattern", "layers 4, 5, 6, 7", "default"),
    ("{softmax: [], default: lightning}", "layers.pattern.softmax", "[]", "[0]"),
    ("{softmax: '8::2', default: lightning}", "layers.pattern.softmax", "'8::2'", "model.depth = 8"),
    ("{softmax: '2:9', default: lightning}", "layers.pattern.softmax", "'2:9'", "model.depth = 8"),
    ("{softmax: '::0', default: lightning}", "layers.pattern.softmax", "'::0'", "1::2"),
    ("{softmax: all, default: lightning}", "layers.pattern.softmax", "'all'", "1::2"),
    ("{softmax: 3, default: lightning}", "layers.pattern.softmax", "3", "[0]", "ratio"),
    ("{softmax: [3], lightning: 3}", "layers.pattern.lightning", "3", "[0]", "ratio"),
    ("{softmax: [3], default: lightening}", "layers.pattern", "'lightening'", "'lightning'"),
    ("{softmax: [3], default: [lightning]}", "layers.pattern.default", "['lightning']", "name of a mixer"),
    ("{softmax: [true], default: lightning}", "layers.pattern.softmax", "True"),
    ("{softmax: true, lightning: 3}", "layers.pattern.softmax", "True"),
]


@pytest.mark.parametrize(("pattern", "parts"), [(case[0], case[1:]) for case in REFUSED])
def test_patterns_that_cannot_work_are_refused_in_one_line(pattern: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as refusal:
        compose("base", [f"layers.pattern={pattern}"])
    message = str(refusal.value)
    assert message.startswith(parts[0]) and all(part in message for part in parts) and "\n" not in message


MIXERS_REFUSED = [
    (["layers.mixers.near.window=3"], "layers.mixers.near", "no mixer 'near'", "{mixer: softmax}"),
    (["layers.mixers.softmx.heads=3"], "layers.mixers.softmx", "'softmx'", "'softmax'"),
    (["layers.mixers.near.mixer=softmx"], "layers.mixers.near.mixer", "'softmx'", "'softmax'"),
    (["layers.mixers.softmax.mixer=lightning"], "layers.mixers.softmax", "taken"),
    (["layers.mixers.default.mixer=lightning"], "layers.mixers.default", "taken"),
    (["+layers.mixers.near={mixer: softmax, heds: 3}"], "layers.mixers.near.heds", "'heads'", "softmax has"),
    (
        ["layers.pattern=near", "+layers.mixers.near={mixer: softmax, heads: 3}"],
        "layers.mixers.near.heads",
        "3",
        "divide",
    ),
    (
        ["layers.mixers.softmax.heads=2", "parallel.sequence=3", "parallel.strategy=ulysses"],
        "parallel.strategy",
        "H = 2",
    ),
    (
        ["layers.mixers.softmax.heads=2", "parallel.sequence=4", "layers.mixers.softmax.strategy=ulysses"],
        "layers.mixers.softmax.strategy",
        "'ulysses'",
        "4 ranks",
        "'ring'",
    ),
    (
        ["layers.pattern=gla", "+layers.mixers.gla={heads: 2, strategy: ulysses}", "parallel.sequence=4"],
        "layers.mixers.gla.strategy",
        "'ulysses'",
        "2 heads over 4 ranks",
        "'chain'",
    ),
    (
        [
            "layers.pattern=gla",
            "+layers.mixers.gla={heads: 4, strategy: ulysses}",
            "parallel.sequence=4",
            "parallel.rows=2",
        ],
        "layers.mixers.gla.strategy",
        "'ulysses'",
        "parallel.rows = 2",
        "'chain'",
    ),
    (["parallel.strategy=chain"], "parallel.strategy", "'chain'", "'ring'", "layers.mixers.NAME.strategy"),
    (["layers.pattern=gla", "+layers.mixers.gla={strategy: ring}"], "layers.mixers.gla.strategy", "'ring'", "alltoall"),
    *(
        (["layers.pattern=gla", f"parallel.strategy={name}"], "parallel.strategy", f"'{name}'", "auto", "softmax layer")
        for name in ("ring", "allgather", "ulysses", "mesh")
    ),
    (
        ["layers.pattern=[softmax, gla]", "parallel.strategy=ring", "layers.mixers.softmax.strategy=allgather"],
        "parallel.strategy",
        "'ring'",
        "softmax has its own",
        "layers.mixers.softmax.strategy",
    ),
    (["layers.mixers.softmax.pamm=0"], "layers.mixers.softmax.pamm", "got 0", "1 or more"),
    *(
        (["layers.mixers.softmax.pamm=8", f"memory.recompute={policy}"], "layers.mixers.softmax.pamm", "got 8", "=none")
        for policy in ("full", "attention", "[attention]", "{softmax: full}")
    ),
    # Of mixers that no layer has.
    (["layers.pattern=gla", "layers.mixers.softmax.heads=3"], "layers.mixers.softmax.heads", "3", "divide"),
    (["layers.pattern=gla", "layers.mixers.softmax.heads=two"], "layers.mixers.softmax.heads", "'two'", "whole number"),
    (["layers.pattern=gla", "+layers.mixers.near={mixer: softmax, window: -1}"], "layers.mixers.near.window", "-1"),
    (["layers.pattern=softmax", "layers.mixers.gla.strategy=ring"], "layers.mixers.gla.strategy", "'ring'", "alltoall"),
    (["layers.mixers.gla=3"], "layers.mixers.gla", "got 3", "{heads: 8}"),
    (["layers.mixers.gla=null"], "layers.mixers.gla", "got None", "{heads: 8}"),
    (["layers.mixers={gla: [1]}"], "layers.mixers.gla", "got [1]", "{heads: 8}"),
    (["layers.mixers={3: {heads: 2}}"], "layers.mixers", "3", "one of your own"),
]


@pytest.mark.parametrize(("overrides", "parts"), [(case[0], case[1:]) for case in MIXERS_REFUSED])
def test_mixers_that_cannot_work_are_refused_in_one_line(overrides: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as refusal:
        compose("base", overrides)
    message = str(refusal.value)
    assert message.startswith(parts[0]) and all(part in message for part in parts) and "\n" not in message
