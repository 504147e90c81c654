"""Recipes: what composes, and what is refused in one line that names the key, the value and what would work."""

import dataclasses
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from longtrain.config import RECIPES, compose, from_mapping, read_run, recipe_names, to_yaml
from longtrain.errors import UsageError
from longtrain.model import Decoder, count_parameters
from longtrain.recipe import degrees
from longtrain.run_folder import create, write_config


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_composes_and_survives_its_yaml(name: str, tmp_path: Path) -> None:
    given = []
    if name.startswith("linearise_"):  # from the folder of a run that has a checkpoint
        run = made_run(tmp_path / "run", "layers.pattern=softmax")
        (run / "checkpoints/step-00000001").mkdir(parents=True)
        given = [f"linearise.from={run}"]
    recipe = compose(name, given)
    assert recipe.recipe == name
    assert from_mapping(OmegaConf.create(to_yaml(recipe))) == recipe  # type: ignore[arg-type]


def test_base_yaml_has_every_key_once_with_a_reason_and_the_dataclass_default() -> None:
    text = (RECIPES / "base.yaml").read_text()
    lines = [line for line in text.splitlines() if ":" in line and not line.startswith(("#", "defaults", "  - "))]
    sections = [line for line in lines if line.endswith(":")]
    assert all("  # " in line for line in lines if line not in sections)
    plain = compose("base")
    default = dataclasses.replace(type(plain)(), recipe="base")
    assert plain == default


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        compose("quickstart").trainer.steps = 3  # type: ignore[misc]


def test_values_reach_their_keys() -> None:
    recipe = compose("quickstart", ["trainer.steps=7", "layers.mixers.softmax.kv_heads=2", "parallel.layout=striped:8"])
    assert recipe.trainer.steps == 7
    assert recipe.layers.mixers["softmax"] == compose("quickstart").layers.mixers["softmax"] | {"kv_heads": 2}
    assert recipe.parallel.layout == "striped:8"


@pytest.mark.parametrize("path", ["a=b", "with space/c", "x[1],y", "it's", '"quoted"', "back\\slash", "${seed}"])
def test_paths_may_hold_anything(path: str) -> None:
    wanted = path.strip('"') if path.startswith('"') else path
    assert compose("quickstart", [f"run_dir={path}"]).run_dir == (wanted if path != "${seed}" else "0")


REFUSED = [
    (["trainer.stps=3"], "trainer.stps", "trainer.steps"),
    (["trainer.steps=abc"], "trainer.steps", "'abc'", "a whole number"),
    (["trainer.steps=1.5"], "trainer.steps", "1.5", "a whole number"),
    (["trainer.steps=0"], "trainer.steps", "0", "1 or more"),
    (["trainer=3"], "trainer", "trainer.steps"),
    (["trainer.clip=0"], "trainer.clip", "0", "above 0"),
    (["trainer.precision=float16"], "trainer.precision", "'float16'", "bfloat16"),
    (["model.vocabulary=256"], "model.vocabulary", "256", "257 token ids", "or null"),
    (["model.vocabulary=99999999"], "model.vocabulary", "16777216 or less"),
    (["model.width=null"], "model.width", "a whole number"),
    (["model.tie_embedding=perhaps"], "model.tie_embedding", "'perhaps'", "true or false"),
    (["data=txt"], "data", "'txt'", "text"),
    (["data=text"], "data.path", "folder or a glob"),
    (["data.path=notes"], "data.path", "'notes'", "data=text"),
    (["data.length=0"], "data.length", "0", "1 or more"),
    (["data.held_out=1.5"], "data.held_out", "1.5"),
    (["data.source=mqr"], "data.source", "'mqr'", "'mqar'"),
    (["data.source=mqar"], "data.pairs", "null", "data=mqar"),
    (["data.pairs=4"], "data.pairs", "4", "data=stdlib", "data=mqar"),
    (["data=text", "data.path=x", "data.selective=true"], "data.selective", "True", "data=copy"),
    (["data=mqar", "data.path=x"], "data.path", "'x'", "data=text"),
    (["data=mqar", "data.held_out=0.3"], "data.held_out", "0.3", "data=stdlib or data=text"),
    (["data=mqar", "data.pair=4"], "data.pair", "data.pairs"),
    (["data=mqar", "data.pairs=few"], "data.pairs", "'few'", "a whole number or a list"),
    (["data=mqar", "data.pairs=[]"], "data.pairs", "[]", "from 1"),
    (["data=mqar", "data.pairs=[4,0]"], "data.pairs", "[4, 0]", "from 1"),
    (["data=mqar", "data.pairs=[4,4]"], "data.pairs", "[4, 4]", "once"),
    (["data=mqar", "data.pairs=64", "data.vocabulary=128"], "data.vocabulary", "128", "130 or more"),
    (["data=mqar", "data.vocabulary=9999999"], "data.vocabulary", "9999999", "or less"),
    (["data=mqar", "data.length=127"], "data.length", "127", "128 tokens or more"),
    (["data=passkey", "data.length=101"], "data.length", "101", "102 tokens or more"),
    (["data=passkey", "data.depth=1.5"], "data.depth", "1.5", "from 0 to 1"),
    (["data=passkey", "data.digits=0"], "data.digits", "0", "1 or more"),
    (["data=passkey", "data.vocabulary=300"], "data.vocabulary", "300", "data=mqar or data=copy"),
    (["data=copy", "data.items=0"], "data.items", "0", "1 or more"),
    (["data=copy", "data.length=31"], "data.length", "31", "32 tokens or more"),
    (["data=copy", "data.vocabulary=3"], "data.vocabulary", "3", "4 or more"),
    (["layers.pattern=[softmx]"], "layers.pattern", "'softmx'", "'softmax'"),
    (["layers.pattern=[]"], "layers.pattern", "lightning"),
    (["layers.mixers.softmx.heads=2"], "layers.mixers.softmx", "'softmax'"),
    (["layers.mixers.softmax.heds=4"], "layers.mixers.softmax.heds", "'heads'"),
    (["layers.mixers.softmax.heads=3"], "layers.mixers.softmax.heads", "3", "divide model.width"),
    (["layers.mixers.softmax.kv_heads=3"], "layers.mixers.softmax.kv_heads", "3", "divide heads"),
    (["layers.mixers.softmax.heads=many"], "layers.mixers.softmax.heads", "'many'", "whole number"),
    (["layers.mixers.lightning.heads=true"], "layers.mixers.lightning.heads", "True", "whole number"),
    (["parallel.sequence=3"], "parallel.sequence", "3", "2 processes", "1, 2"),
    (["parallel.data=2", "parallel.sequence=2"], "parallel.data", "2", "4", "parallel.data=1"),
    (["parallel.rows=3"], "parallel.rows", "3", "2 ranks"),
    (
        ["parallel.strategy=ulysses", "launch.processes=3"],
        "parallel.strategy",
        "'ulysses'",
        "H = 2",
        "3 ranks",
        "'ring'",
    ),
    (["parallel.strategy=ulysses", "parallel.rows=2"], "parallel.strategy", "2 x 1 ranks", "'mesh'"),
    (["parallel.rows=0"], "parallel.rows", "0", "1 or more"),
    (["parallel.layout=zigzg"], "parallel.layout", "'zigzg'", "zigzag"),
    (["parallel.layout=striped:0"], "parallel.layout", "striped:0"),
    (["parallel.strategy=ulises"], "parallel.strategy", "'ulises'", "ring"),
    (["parallel.data=2", "trainer.sequences=3"], "trainer.sequences", "3", "trainer.sequences=4"),
    (["memory.recompute=ful"], "memory.recompute", "'ful'", "'full'"),
    (["memory.recompute=[atention]"], "memory.recompute", "'atention'", "'attention'"),
    (["memory.offload=input"], "memory.offload", "'input'", "'inputs'"),
    (["memory.offload=inputs"], "memory.offload", "memory.recompute=attention"),
    (["memory.tile=0"], "memory.tile", "0", "1 or more"),
    (["memory.attention_heads=0"], "memory.attention_heads", "0", "1 or more key heads"),
    (["memory.attention_heads=1", "layers.pattern=gla"], "memory.attention_heads", "1", "a softmax layer"),
    (
        ["memory.attention_heads=1", "layers.mixers={softmax: {heads_at_once: 2}}"],
        "memory.attention_heads",
        "no layers.mixers.softmax.heads_at_once",
    ),
    (["layers.mixers={softmax: {heads_at_once: 0}}"], "layers.mixers.softmax.heads_at_once", "0", "from 1 on"),
    (["memory.recompute={sofmax: full}"], "memory.recompute.sofmax", "'softmax'"),
    (["engine=fsdpp"], "engine", "'fsdpp'", "fsdp"),
    (["optimizer.name=adam"], "optimizer.name", "'adam'", "adamw"),
    (["optimizer.beta2=1.0"], "optimizer.beta2", "1.0"),
    (["schedule.name=cos"], "schedule.name", "'cos'", "cosine"),
    (["seed=-1"], "seed", "-1", "0 or more"),
    (["launch.processes=0"], "launch.processes", "0", "1 or more"),
    (["+new.key=1"], "new.key", "no such key"),
    (["~trainer.steps"], "trainer.steps", "removed"),
    (["trainer.steps=1,2"], "trainer.steps", "several values"),
    (["trainer.steps"], "trainer.steps", "key=value"),
    (["=3"], "=3", "key=value"),
    (["data@x=text"], "data@x", "key=value"),
    (["layers.mixers.softmax.strategy=foo"], "layers.mixers.softmax.strategy", "'foo'", "ring"),
    (["seed=99999999999999999999999"], "seed", "or less"),
    (["launch.timeout=.inf"], "launch.timeout", "inf", "or less"),
    (["model.norm_eps=-1"], "model.norm_eps", "-1", "0 or more"),
    (["model.norm_eps=.nan"], "model.norm_eps", "nan"),
    (["run_dir=''"], "run_dir", "empty"),
    (["model.meta_tokens=-1"], "model.meta_tokens", "-1", "0 or more"),
    (["model.meta_tokens=4"], "model.meta_tokens", "4", "lightning, softmax cannot", "hymba can"),
]


@pytest.mark.parametrize(("overrides", "parts"), [(case[0], case[1:]) for case in REFUSED])
def test_refused_in_one_line(overrides: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as refusal:
        compose("quickstart", overrides)
    message = str(refusal.value)
    assert message.startswith(parts[0]) or parts[1] == "removed"
    assert all(part in message for part in parts) and "\n" not in message


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="'quikstart'.*'quickstart'"):
        compose("quikstart")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trainer: {stps: 3}", ("trainer.stps", "trainer.steps")),
        ("trainer: {steps: abc}", ("trainer.steps", "'abc'", "a whole number")),
        ("model: 3", ("model", "3", "model.width")),
        ("model: {_target_: os.system}", ("model._target_", "import")),
        ("layers: {mixers: {softmax: {_target_: os.system}}}", ("layers.mixers.softmax._target_",)),
        ("model: {", ("mine.yaml", "line")),
        ("model: {width: '${nowhere}'}", ("model.width", "nowhere")),
    ],
)
def test_recipe_files_of_ones_own_are_checked_too(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: [base, _self_]\n{text}\n")
    with pytest.raises(UsageError) as refusal:
        compose(str(path))
    assert all(part in str(refusal.value) for part in parts) and "\n" not in str(refusal.value)


def test_unusual_recipe_files(tmp_path: Path) -> None:
    assert compose(str(write(tmp_path / "bare.yaml", b"trainer: {steps: 2}\n"))).trainer.steps == 2
    for name, content, part in (
        ("binary.yaml", b"\xff\xfe\x00", "defaults: [base, _self_]"),
        ("wrong.yaml", b"defaults: [bas]", "defaults: [base, _self_]"),
        ("short.yml", b"trainer: {steps: 2}", ".yaml"),
    ):
        with pytest.raises(UsageError) as refusal:
            compose(str(write(tmp_path / name, content)))
        assert part in str(refusal.value)
    with pytest.raises(UsageError, match="no '../recipes/quickstart'"):
        compose("../recipes/quickstart")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_yamls_infinity_works_on_the_command_line() -> None:
    assert compose("quickstart", ["trainer.clip=.inf"]).trainer.clip == float("inf")


def made_run(folder: Path, *overrides: str) -> Path:
    create(folder)
    write_config(folder, to_yaml(compose("quickstart", overrides)))
    return folder


def test_a_resumed_run_keeps_its_settings_but_for_the_given_ones(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "optimizer.learning_rate=0.5", "data.length=77", "trainer.steps=9")
    recipe = compose("quickstart", [f"resume={run}", "trainer.steps=12"])
    assert (recipe.optimizer.learning_rate, recipe.data.length, recipe.trainer.steps) == (0.5, 77, 12)
    with pytest.raises(UsageError, match="run_dir: got 'elsewhere'"):
        compose("quickstart", [f"resume={run}", "run_dir=elsewhere"])
    with pytest.raises(UsageError, match="resume: .*quickstart, not base"):
        compose("base", [f"resume={run}"])


@pytest.mark.parametrize("content", ["[1,2", "- a", ""])
def test_a_damaged_config_of_a_run_is_named(tmp_path: Path, content: str) -> None:
    run = made_run(tmp_path / "run")
    (run / "config.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"config\.yaml is damaged"):
        read_run(run)


def test_a_recipe_file_of_ones_own_starts_from_base_and_its_groups(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [base, _self_]\ntrainer: {steps: 7}\n")
    recipe = compose(str(path), ["data=text", "data.path=notes"])
    assert (recipe.recipe, recipe.trainer.steps, recipe.data.source) == ("mine", 7, "text")
    with pytest.raises(UsageError, match="no file"):
        compose(str(tmp_path / "other.yaml"))


def test_degrees_are_worked_out() -> None:
    recipe = compose("base")
    assert degrees(recipe, 4) == (1, 4)
    assert degrees(compose("base", ["parallel.sequence=2", "trainer.sequences=2"]), 4) == (2, 2)
    assert degrees(compose("base", ["parallel.data=2", "trainer.sequences=2"]), 6) == (2, 3)
    with pytest.raises(UsageError, match="trainer.sequences"):
        degrees(compose("base", ["parallel.sequence=1"]), 2)


@pytest.mark.parametrize(
    ("name", "override", "option", "tokens"),
    [
        ("mega", "layers.mixers.mega.chunk=999999", "mega.chunk", "999,999"),
        ("rat", "layers.mixers.rat.chunk=4097", "rat.chunk", "4,097"),
        ("moba", "layers.mixers.moba.block=1000000000000", "moba.block", "1,000,000,000,000"),
        ("natsl", "layers.mixers.natsl.chunk=4097", "natsl.chunk", "4,097"),
        ("chela", "layers.mixers.chela.scales=100", "chela.scales", "10,141,204,801,825,835,211,973,625,643,008"),
    ],
)
def test_pieces_longer_than_the_sequences_that_they_cut_are_refused(
    name: str, override: str, option: str, tokens: str
) -> None:
    with pytest.raises(UsageError) as refused:
        compose(name, [override])
    assert str(refused.value).startswith(f"layers.mixers.{option}: got pieces of {tokens} tokens, longer than")
    assert "4,096 tokens or fewer would work" in str(refused.value)
    compose(name, [override.partition("=")[0] + "=4"])


@pytest.mark.parametrize(
    ("name", "layer"), [("softmax", "softmax"), ("masformer", "near"), ("lizard", "lizard"), ("hymba", "wide")]
)
def test_windows_that_hold_whole_sequences_are_refused(name: str, layer: str) -> None:
    with pytest.raises(UsageError) as refused:
        compose(name, [f"layers.mixers.{layer}.window=4096"])
    assert str(refused.value).startswith(f"layers.mixers.{layer}.window: got 4,096 tokens besides its own")
    assert "4,095 or fewer would work, or a data.length above 4,096" in str(refused.value)
    compose(name, [f"layers.mixers.{layer}.window=4095"])
    compose("softmax", ["layers.pattern=sliding_window", "data.length=256"])  # a default was not asked for


ARCHITECTURES = ("chela", "hymba", "lizard", "masformer", "mega", "mixed_window", "moba", "natsl", "rat", "rat_window")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_the_size_and_budget_that_softmax_has(name: str) -> None:
    """Those of softmax.yaml, which they are measured against."""
    ours, softmax = compose(name, []), compose("softmax", [])
    assert (ours.data, ours.trainer) == (softmax.data, softmax.trainer)
    with torch.device("meta"):
        models = [Decoder(recipe.model, recipe.layers, vocabulary=257) for recipe in (ours, softmax)]
    assert count_parameters(models[0]) == pytest.approx(count_parameters(models[1]), rel=0.01)
