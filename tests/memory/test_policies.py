"""`memory.recompute` as data: what each form means, and what is refused."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from longtrain.config import compose, from_mapping, to_yaml
from longtrain.errors import UsageError
from longtrain.memory import Policy, layer_policies
from longtrain.memory.operators import DISTRIBUTED

LAYERS = ("gla", "gla", "softmax", "narrow")
KEEP_ALL, FULL = Policy(recompute=False), Policy(recompute=True)
ATTENTION = Policy(recompute=True, kept=tuple(DISTRIBUTED.values()))


def _names(policy: Policy) -> list[str]:
    return [operator.name for operator in policy.kept]


def test_one_policy_is_for_every_layer() -> None:
    assert layer_policies("none", LAYERS) == [KEEP_ALL] * 4
    assert layer_policies("full", LAYERS) == [FULL] * 4
    assert layer_policies("attention", LAYERS) == [ATTENTION] * 4


def test_operators_are_named_shortly_or_in_full() -> None:
    (policy,) = layer_policies(["attention", "conv1d"], ["gla"])
    assert policy.recompute and _names(policy) == ["attention", "conv1d"]
    full = ["longtrain::sequence_parallel_attention", "longtrain::sequence_parallel_conv1d"]
    assert layer_policies(full, ["gla"]) == [policy]
    (matrices,) = layer_policies(["aten::mm"], ["gla"])
    assert {str(operator.overload) for operator in matrices.kept} >= {"aten.mm.default"}


def test_a_mapping_says_it_for_each_mixer() -> None:
    assert layer_policies({"softmax": "attention", "gla": "full"}, LAYERS) == [FULL, FULL, ATTENTION, KEEP_ALL]
    found = layer_policies({"narrow": ["attention"], "default": "full"}, LAYERS)
    assert found[:3] == [FULL] * 3 and _names(found[3]) == ["attention"]


@pytest.mark.parametrize(
    ("recompute", "parts"),
    [
        ("atention", ("memory.recompute: got 'atention'", "nearest: 'attention'", "none, full, attention")),
        (True, ("memory.recompute: got True", "none, full, attention")),
        (None, ("memory.recompute: got None",)),
        ([], ("memory.recompute: got an empty list", "full")),
        (["atention"], ("memory.recompute: no operator 'atention'", "nearest: 'attention'", "delta_rule")),
        (["aten::mmm"], ("memory.recompute: no operator 'aten::mmm'", "nearest: 'aten::mm'")),
        ([3], ("memory.recompute: no operator 3",)),
        ([["attention"]], ("memory.recompute: no operator ['attention']",)),
        (["aten::view"], ("memory.recompute: operator 'aten::view'", "views")),
        (["aten::add_"], ("memory.recompute: operator 'aten::add_'", "writes")),
        ({}, ("memory.recompute: got an empty mapping", "{gla: attention}")),
        ({"glaa": "full"}, ("memory.recompute.glaa", "nearest: 'gla'", "softmax, narrow and default")),
        ({"gla": "ful"}, ("memory.recompute.gla: got 'ful'", "nearest: 'full'")),
        ({"gla": ["delta_rul"]}, ("memory.recompute.gla: no operator 'delta_rul'", "nearest: 'delta_rule'")),
        ({"default": {"gla": "full"}}, ("memory.recompute.default: got {'gla': 'full'}",)),
    ],
)
def test_what_is_no_policy_is_refused(recompute: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as refusal:
        layer_policies(recompute, LAYERS)
    assert all(part in str(refusal.value) for part in parts), refusal.value


def test_recipes_and_the_command_line_have_every_form() -> None:
    for given, expected in (
        ("full", "full"),
        ("[attention,conv1d]", ["attention", "conv1d"]),
        ("{lightning: attention, default: full}", {"lightning": "attention", "default": "full"}),
    ):
        recipe = compose("quickstart", [f"memory.recompute={given}", "layers.pattern=lightning"])
        assert recipe.memory.recompute == expected
        assert from_mapping(OmegaConf.create(to_yaml(recipe))) == recipe  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"memory\.recompute\.gla: no layer has a mixer 'gla'"):
        compose("quickstart", ["memory.recompute={gla: full}", "layers.pattern=lightning"])
