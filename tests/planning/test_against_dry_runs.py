"""Plans against dry runs of the same recipes: every term above 100 MB within 5 %."""

import pytest

from longtrain.dry_run import TERMS
from longtrain.launch.dry_runs import dry_run
from longtrain.planning import devices_named, plan

CASES = [
    ("llama_8b_128k", "8xh200", ["model.depth=2", "memory.recompute=full"]),
    ("llama_8b_128k", "8xh200", ["model.depth=3", "memory.recompute=attention"]),
    ("llama_8b_128k", "8xh200", ["model.depth=2", "memory.recompute=none"]),
    ("llama_8b_128k", "8xh200", ["model.depth=4", "trainer.sequences=2", "trainer.accumulation=2"]),
    ("llama_8b_1m", "8xh200", []),
    ("llama_8b_1m", "8xh200", ["model.depth=2", "memory.recompute=full", "memory.attention_heads=2"]),
    ("llama_8b_3700k", "8xh100", ["model.depth=2"]),
    ("llama_8b_15m", "32xh100", ["model.depth=4"]),
    ("llama_8b_128k", "1xh200", ["memory.recompute=full"]),
    ("llama_8b_1m", "8xh200", ["model.depth=8", "model.vocabulary=4096", "memory.offload=attention"]),
    ("llama_8b_zero3", "8xh100", []),
    ("llama_8b_zero3", "8xh100", ["model.depth=2", "trainer.precision=float32", "data.length=65536"]),
    ("llama_8b_zero3", "8xh100", ["model.depth=3", "deepspeed.offload_optimizer=none", "data.length=8192"]),
    ("llama_8b_zero3", "8xh100", ["model.depth=2", "deepspeed.offload_optimizer=none", "model.tie_embedding=true"]),
    (
        "llama_8b_128k",
        "8xh200",
        ["model.depth=4", "trainer.sequences=2", "trainer.accumulation=2", "engine=deepspeed", "deepspeed.stage=1"],
    ),
    ("llama_8b_128k", "4xh200", ["model.depth=2", "layers.mixers.softmax.layout=balanced"]),
    (
        "llama_8b_128k",
        "8xh200",
        ["model.depth=2", "trainer.sequences=2", "trainer.accumulation=2", "fsdp.replicas=2"],
    ),
    ("llama_8b_128k", "8xh200", ["model.depth=4", "memory.recompute=[aten::mm]"]),
    ("llama_8b_1m", "8xh200", ["model.depth=4", "memory.recompute=[conv1d]"]),
    ("llama_70b_512k", "64xh200", ["model.depth=4"]),
    ("hybrid_1b_1m", "1xh200", []),
    ("hybrid_1b_4m", "8xh200", []),
    ("hybrid_1b_4m", "8xh200", ["model.depth=4", "memory.recompute=attention", "memory.offload=none"]),
    ("hybrid_1b_4m", "8xh200", ["model.depth=4", "layers.pattern=mamba2", "layers.mixers.mamba2.heads=32"]),
    ("hybrid_1b_4m", "8xh200", ["model.depth=4", "layers.pattern=gsa", "layers.mixers.gsa.heads=16"]),
    ("llama_8b_128k", "8xh200", ["model.depth=2", "memory.recompute=none", "layers.mixers.softmax.pamm=1024"]),
    ("quickstart", "2xcpu", ["data.length=16384"]),  # "auto" takes Ulysses for the documents, a ring for a single one
    ("quickstart", "2xcpu", ["data.length=16384", "parallel.strategy=ring"]),
    ("quickstart", "2xcpu", ["data.length=16384", "parallel.strategy=ulysses"]),
    ("hymba", "1xcpu", ["data.length=8192"]),
    ("hymba", "1xcpu", ["data.length=8192", "memory.recompute=attention"]),
    ("mega", "1xcpu", []),
    ("natsl", "2xcpu", ["data.length=8192", "memory.recompute=attention"]),
]
EVERY_TIME = [
    ("hybrid_1b_4m", "8xh200", ["model.depth=4"]),
    ("llama_8b_zero3", "8xh100", ["model.depth=4", "data.length=65536"]),
]
CHOSEN = [pytest.param(*case) for case in EVERY_TIME] + [pytest.param(*case, marks=pytest.mark.full) for case in CASES]


@pytest.mark.parametrize(("recipe", "devices", "overrides"), CHOSEN)
def test_plans_are_what_dry_runs_hold(recipe: str, devices: str, overrides: list[str]):
    named = devices_named(devices)
    whole = plan(recipe, overrides, named)
    dry = dry_run(recipe, overrides, world=named.count, architecture=named.device.architecture)
    planned, held = whole.memory, dry.peak
    off = {t: planned.terms[t] / max(held[t], 1) - 1 for t in TERMS if max(held[t], planned.terms[t]) > 1e8}
    off["total"] = planned.total / held["total"] - 1
    off["building"] = whole.building / dry.building["total"] - 1
    if whole.shape.recipe.memory.offload == "none":  # what was offloaded comes back before all of it is away
        off["host"] = planned.host / max(dry.host_peak, 1) - 1 if planned.host else 0.0
    assert max(map(abs, off.values())) < 0.05, off
