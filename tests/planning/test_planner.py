"""Plans: counts that can be worked out by hand, what fits, what would make it fit, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from longtrain.config import compose
from longtrain.errors import UsageError
from longtrain.layers.mixers import MIXERS
from longtrain.planning import devices_named, longest, plan, search, terms
from longtrain.planning.planner import best_change, that_fit

GIB = 2**30
# Weights of a block: q and out, k and v, gate and up and down, two norms; then embedding, head and the last norm.
LLAMA_8B = 32 * (4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096) + (2 * 128256 + 1) * 4096
# Recipes of real sizes, and what they are for.
SIZED = {
    "llama_8b_128k": "8xh200",
    "llama_8b_1m": "8xh200",
    "llama_8b_15m": "32xh100",
    "llama_8b_3700k": "8xh100",
    "llama_8b_zero3": "8xh100",
    "hybrid_1b_1m": "1xh200",
    "hybrid_1b_4m": "8xh200",
    "llama_70b_512k": "64xh200",
}


def test_devices_are_known_by_number_and_name():
    devices = devices_named("8xH200")
    assert (devices.count, devices.device.name, devices.nodes) == (8, "h200", 1)
    assert devices.device.memory > 130 * GIB and devices.device.architecture == "sm_90"
    assert devices_named("h100").count == 1 and devices_named("64 x b200").nodes == 8
    two = devices_named("2xcpu")
    assert two.device.architecture is None and two.device.memory * 2 == two.device.host_memory > GIB


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("8xh20", r"--devices: no 'h20' \(nearest: 'h200'\); there are a100, h100, h200, b200, mi300x, cpu"),
        ("0xh100", "--devices: got 0 devices, expected 1 to"),
        ("h100x8!", "--devices: got 'h100x8!', expected a number and a name such as 8xh200"),
    ],
)
def test_devices_that_do_not_exist_are_refused(given: str, message: str):
    with pytest.raises(UsageError, match=message):
        devices_named(given)


def test_weights_and_work_are_counted():
    planned = plan("llama_8b_128k", [], devices_named("8xh200"))
    shape, length = planned.shape, 131072
    assert shape.weights == LLAMA_8B
    assert shape.degrees == (1, 8) and shape.tokens == length // 8
    # Forward: twice every matrix of the blocks and the head, and 4 H K for each pair of a query and a key it sees.
    matrices = LLAMA_8B - (128256 + 65) * 4096
    pairs = length * (length + 1) // 2
    assert shape.model_flops == pytest.approx(3 * (2 * length * matrices + 32 * 4 * 4096 * pairs), rel=1e-9)
    assert planned.memory.terms["weights"] == 4 * LLAMA_8B / 8
    assert planned.memory.terms["optimizer"] == 8 * LLAMA_8B / 8
    assert 0 < planned.utilization < 1 and planned.tokens_per_second > 0


def test_a_mixers_bytes_are_tried_where_they_are_not_counted():
    mixers = plan("hybrid_1b_1m", [], devices_named("1xh200")).shape.mixers
    delta, attention = mixers[0], mixers[3]
    # bfloat16: q, k and v of the convolution and the delta rule's output; then attention's output and lse.
    assert delta.results == 2 * (2 * 1024 + 2048 + 2048) and attention.results == 2 * 2048 + 4 * 16
    assert delta.input == attention.input == 2 * 2048
    # What the convolution was given, q and k of length 1, both gates and their norm, at least.
    assert delta.kept > 2 * (2 * 1024 + 2048 + 2 * 1024 + 2 * 2048)
    assert delta.ring > 3 * delta.results and delta.kept_results < delta.results
    assert mixers[1] == mixers[2] == mixers[4]


@pytest.mark.parametrize("names", [("gsa", "chela", "natsl"), pytest.param(tuple(MIXERS), marks=pytest.mark.full)])
def test_mixers_can_be_tried(names: tuple[str, ...]):
    pattern = f"layers.pattern=[{','.join(names)}]"
    overrides = [pattern, f"model.depth={len(names)}", "layers.mixers={}", "data.length=131072"]
    planned = plan("quickstart", overrides, devices_named("2xh200"))
    for layer, mixer in zip(planned.shape.layers, planned.shape.mixers, strict=True):
        least = planned.shape.size * layer.place.width  # as wide as the model
        assert mixer.results + mixer.kept >= 2 * least and mixer.working > 0, layer.name


def test_what_does_not_grow_with_the_tokens_counts_once():
    short, long = (plan("mega", [f"data.length={n}"], devices_named("1xcpu")).shape for n in (1024, 2048))
    once = 2 * 1024 * short.mixers[0].kept - 2048 * long.mixers[0].kept
    matrices = 128 * 128 * 128 * 4  # the moving average's filter of each channel, for the tokens of a chunk
    assert matrices < once < 2 * matrices


def test_keys_and_values_of_the_layer_before_are_held_once():
    full, none = (plan("hymba", [f"memory.recompute={x}"], devices_named("1xh200")).shape for x in ("full", "none"))
    assert [layer.name for layer in full.layers] == ["wide", "near", "reader", "wide"]
    both, positions = 4 * (64 + 64), 8  # one head of keys, one of values
    assert [round(mixer.between) for mixer in full.mixers] == [positions, positions, positions + both, positions]
    # Where nothing is computed again they are among what the layer has kept that made them.
    near, reader = (mixer.between for mixer in none.mixers[1:3])
    assert near - reader == pytest.approx(both + 4 * 64, rel=1e-3)  # and keys before they were turned
    listed = plan("hymba", ["memory.recompute=[attention]"], devices_named("1xh200")).shape
    assert [round(block.between) for block in listed.blocks] == [positions, positions, positions + both, positions]


def test_attention_that_keeps_few_rows_keeps_no_input():
    overrides = ["layers.mixers.softmax.pamm=1024", "memory.recompute=none"]
    few, all_rows = (plan("llama_8b_128k", x, devices_named("8xh200")).shape.mixers[0] for x in (overrides, []))
    assert all_rows.input == 2 * 4096 and few.input == 0
    assert few.results == all_rows.results + 2 * 2 * 8 * 128  # and the keys and values that the ring held last
    rows = 1024 * 4096 * 2 / (131072 / 8)  # spread over the tokens of a rank
    assert few.kept == pytest.approx(all_rows.kept + rows + 16, abs=8)  # and an index and a scale for each token


def test_more_sequences_are_documents_of_their_own():
    one = plan("llama_8b_128k", [], devices_named("8xh200")).shape
    two = plan("llama_8b_128k", ["trainer.sequences=2"], devices_named("8xh200")).shape
    assert two.cu_seqlens.tolist() == [0, 131072, 262144]
    assert two.model_flops == pytest.approx(2 * one.model_flops)  # none sees the other
    apart = plan("llama_8b_128k", ["trainer.sequences=2", "parallel.data=2"], devices_named("8xh200")).shape
    assert apart.degrees == (2, 4) and np.diff(apart.cu_seqlens).tolist() == [131072]


def test_what_auto_takes_goes_by_the_documents_that_there_are(tmp_path: Path):
    devices, auto = devices_named("2xcpu"), ["data.length=16384"]
    ring, heads = (
        plan("quickstart", [*auto, *more], devices).shape
        for more in (["parallel.strategy=ring", "data=passkey"], ["parallel.strategy=ulysses"])
    )
    assert ring.mixers != heads.mixers
    packed = plan("quickstart", auto, devices).shape
    assert packed.mixers == heads.mixers and len(packed.cu_seqlens) == 2  # its time is that of one document
    assert plan("quickstart", [*auto, "data=passkey"], devices).shape.mixers == ring.mixers
    missing = ["data=text", f"data.path={tmp_path}/nowhere"]
    assert plan("quickstart", [*auto, *missing], devices).shape.mixers == ring.mixers
    (tmp_path / "short.txt").write_text("less than one sequence")
    short = ["data=text", f"data.path={tmp_path}"]
    assert plan("quickstart", [*auto, *short], devices).shape.mixers == ring.mixers


def total(name: str, *overrides: str, devices: str = "8xh200") -> float:
    return plan(name, list(overrides), devices_named(devices)).memory.total


def test_policies_and_devices_move_memory_as_they_should():
    full, attention, none = (total("llama_8b_1m", f"memory.recompute={p}") for p in ("full", "attention", "none"))
    assert full < attention < none
    kept = 31 * 131072 * (4096 * 2 + 32 * 4)  # out and lse of all layers but the one that runs anyway
    assert attention - full == pytest.approx(kept)
    assert total("llama_8b_1m", devices="16xh200") < attention < total("llama_8b_1m", devices="4xh200")
    shared, copied = (total("llama_8b_128k", f"fsdp.replicas={n}") for n in (1, 2))
    assert copied - shared == pytest.approx(12 * LLAMA_8B / 8, rel=0.5) and copied > shared
    offloaded = plan("llama_8b_128k", ["fsdp.cpu_offload=true"], devices_named("8xh200")).memory
    assert offloaded.terms["weights"] == offloaded.terms["optimizer"] == 0 and offloaded.host == 16 * LLAMA_8B / 8


@pytest.mark.parametrize("name", SIZED)
def test_recipes_of_real_sizes_are_planned(name: str):
    planned = plan(name, [], devices_named(SIZED[name]))
    assert planned.needed > 0 and planned.times.step > 0
    assert compose(name).model.vocabulary == 128256
    assert planned.needed < planned.devices.device.memory, f"{planned.needed / GIB:.1f} GiB"
    assert planned.fits
    assert planned.building < planned.memory.total


@pytest.mark.parametrize(
    ("devices", "overrides", "most"),
    [
        ("8xh200", [], 100),
        ("8xh200", ["data.length=1572864", "memory.offload=attention"], 100),
        (
            "1xh200",
            ["data.length=524288", "memory.recompute=full", "memory.offload=inputs", "fsdp.cpu_offload=true"],
            139,
        ),
    ],
)
def test_how_long_a_llama_8b_can_be(devices: str, overrides: list[str], most: float):
    planned = plan("llama_8b_1m", overrides, devices_named(devices))
    assert planned.fits and planned.memory.total < most * GIB
    assert planned.memory.host * planned.devices.count < 900 * GIB


def test_zero_holds_less_at_every_stage_and_leaves_the_rest_to_the_host():
    devices = devices_named("8xh100")
    totals = []
    for stage in (1, 2, 3):
        planned = plan("llama_8b_zero3", [f"deepspeed.stage={stage}", "deepspeed.offload_optimizer=none"], devices)
        held = planned.memory.terms
        assert held["optimizer"] == 8 * LLAMA_8B / 8
        assert planned.memory.host == (2 * LLAMA_8B / 8 if stage == 3 else 0)  # while it is made
        sharded = (4 if stage < 3 else 4 + 2) * LLAMA_8B / 8
        assert held["weights"] == sharded
        totals.append(planned.memory.total)
    assert totals == sorted(totals, reverse=True)
    away = plan("llama_8b_zero3", [], devices).memory
    assert away.terms["optimizer"] == 0 and away.terms["weights"] == 2 * LLAMA_8B / 8
    assert away.host == 20 * LLAMA_8B / 8  # gradients are there twice
    assert totals[-1] - away.total == pytest.approx(16 * LLAMA_8B / 8)


def test_zero_keeps_all_gradients_from_the_second_micro_batch_on():
    changed = ["model.depth=4", "trainer.sequences=2", "trainer.accumulation=2", "engine=deepspeed"]
    stages = [
        plan("llama_8b_128k", [*changed, f"deepspeed.stage={stage}", *more], devices_named("8xh200"))
        for stage, more in ((0, ["trainer.precision=float32"]), (1, []))
    ]
    for planned, each in zip(stages, (4, 4 + 2), strict=True):  # beside those of bfloat16 their sums in float32
        assert planned.memory.terms["gradients"] == each * planned.shape.weights
        assert "layer 4 of 4" in planned.memory.moment


def test_a_tied_heads_gradient_waits_for_the_embeddings():
    changed = ["model.depth=2", "engine=deepspeed"]
    tied, apart = (
        plan("llama_8b_128k", [*changed, f"model.tie_embedding={tie}"], devices_named("8xh200")).memory
        for tie in ("true", "false")
    )
    assert tied.moment == apart.moment
    assert tied.terms["working set"] - apart.terms["working set"] == 2 * 128256 * 4096


def test_attention_on_another_layout_is_no_ring_at_home():
    home, even, auto = (
        plan("llama_8b_128k", ["model.depth=2", *more], devices_named("4xh200")).shape.mixers[0]
        for more in (
            ["layers.mixers.softmax.layout=home", "parallel.strategy=ring"],
            ["layers.mixers.softmax.layout=balanced", "parallel.strategy=ring"],
            ["data=stdlib", "parallel.strategy=ring"],
        )
    )
    assert even.kept < home.kept  # q, k and v went elsewhere
    assert auto == even  # for documents of some thousand tokens


def test_what_lies_on_the_host_is_copied_and_its_optimizer_steps_there():
    short = ["data.length=4096", "memory.recompute=full"]
    here, optimizer, layers = (
        plan("llama_8b_128k", [*short, *more], devices_named("1xh200")).times
        for more in ([], ["fsdp.cpu_offload=true"], ["memory.offload=inputs"])
    )
    assert here.host == 0 and here.optimizer == pytest.approx(LLAMA_8B * 28 / 4.8e12)
    assert optimizer.host == pytest.approx(LLAMA_8B * 4 * 2 / 5e10)  # float32, in forward and again in backward
    assert optimizer.optimizer == pytest.approx(LLAMA_8B * 28 / 6e11)
    assert layers.host == pytest.approx(32 * 4096 * 4096 * 2 / 5e10)
    assert optimizer.limit == "copies to and from the host" and optimizer.step > here.step
    assert optimizer.step >= optimizer.host + optimizer.optimizer


@pytest.mark.parametrize(
    ("recipe", "devices", "overrides"),
    [
        ("hybrid_1b_1m", "1xh200", []),
        ("hybrid_1b_4m", "8xh200", []),
        ("llama_8b_1m", "8xh200", ["memory.offload=attention", "memory.offload_in_flight=2"]),
        ("llama_8b_15m", "32xh100", []),
        ("llama_8b_zero3", "8xh100", []),
    ],
)
def test_no_layer_is_fuller_than_those_that_a_plan_looks_at(recipe: str, devices: str, overrides: list[str]):
    shape = plan(recipe, overrides, devices_named(devices)).shape
    backward = (terms._attention_backward, terms._tile_backward)
    all_moments = [sum(made(shape, n).terms.values()) for made in backward for n in range(len(shape.layers))]
    assert max(all_moments) <= terms.memory(shape).total * (1 + 1e-9)


def test_of_convolutions_the_policy_attention_keeps_next_to_nothing():
    changed = ["model.depth=4", "memory.recompute=attention", "memory.offload=none"]
    planned = plan("hybrid_1b_4m", changed, devices_named("8xh200"))
    outputs = 4 * planned.shape.tokens * 2048 * 2  # of three scans and one attention, 2048 wide in bfloat16
    assert outputs < planned.memory.terms["kept attention"] < 1.02 * outputs


def test_strategies_that_exchange_heads_keep_them():
    changed, devices = ["data.length=16384", "layers.pattern=softmax"], devices_named("2xcpu")
    ring, heads = (plan("quickstart", [*changed, f"parallel.strategy={x}"], devices) for x in ("ring", "ulysses"))
    kept = [planned.memory.terms["kept attention"] for planned in (ring, heads)]
    # Beside out: q, k, v and out of all tokens for half the heads; in a ring the keys and values that were held last.
    assert kept[1] - kept[0] == pytest.approx(4 * ring.shape.tokens * 2 * 64 * 4 * (5 - 3), rel=0.02)


def test_over_ranks_a_window_holds_what_it_sees_of_the_others():
    devices, changed = devices_named("2xh200"), ["memory.recompute=none", "layers.mixers.softmax.kv_heads=2"]
    near, far = (
        plan("llama_8b_128k", [*changed, f"layers.mixers.softmax.window={window}"], devices).shape.mixers[0]
        for window in (1023, "null")
    )
    block = 2 * 2 * 2 * 128  # keys and values of two heads in bfloat16, for each token
    assert near.kept == pytest.approx(far.kept, abs=8) and 0 < far.results - near.results < block
    assert far.results - near.results == pytest.approx(block, rel=0.05)
    assert near.ring < far.ring


def test_an_outer_ring_has_blocks_under_way_beside_the_inner_ones():
    inner = ["parallel.rows=1", "memory.attention_heads=null", "parallel.strategy=ring"]
    one = plan("llama_8b_15m", inner, devices_named("32xh100"))
    two = plan("llama_8b_15m", inner[1:], devices_named("32xh100"))
    block = 2 * one.shape.tokens * 8 * 128  # numbers of keys and values of 8 heads of 128
    assert two.memory.terms["ring buffers"] - one.memory.terms["ring buffers"] == 2 * block * (2 + 4) + 2 * block * 2


@pytest.mark.parametrize("name", ["llama_8b_15m", "llama_8b_3700k"])
def test_the_longest_sequences_need_attention_a_few_heads_at_a_time(name: str):
    devices = devices_named(SIZED[name])
    few, whole = (plan(name, [f"memory.attention_heads={n}"], devices) for n in (2, "null"))
    assert few.fits and not whole.fits
    assert few.memory.terms["ring buffers"] < whole.memory.terms["ring buffers"] / 2
    found = that_fit(name, ["memory.attention_heads=null"], devices)
    assert any("memory.attention_heads=1" in change.overrides for change in found)


def test_what_is_offloaded_lies_on_the_host():
    each, results = 131072 * 4096 * 2, 131072 * (4096 * 2 + 32 * 4)
    inputs, both = (
        plan("llama_8b_1m", [f"memory.offload={what}"], devices_named("8xh200")).memory
        for what in ("inputs", "attention")
    )
    assert inputs.host == 32 * each and both.host == 32 * (each + results)
    assert total("llama_8b_1m") - inputs.total == pytest.approx(29 * each)  # three layers are under way
    assert inputs.total > both.total


def test_what_would_make_a_plan_fit_is_said_fastest_first():
    overrides = ["memory.recompute=none", "data.length=393216"]
    devices = devices_named("8xh100")
    planned = plan("llama_8b_128k", overrides, devices)
    assert not planned.fits and planned.over > 0
    found = that_fit("llama_8b_128k", overrides, devices)
    assert 0 < len(found) <= 3 and all(change.plan.fits for change in found)
    speeds = [change.plan.tokens_per_second for change in found if change.plan.recipe.data.length == 393216]
    assert speeds and speeds == sorted(speeds, reverse=True)
    lengths = [change.plan.recipe.data.length for change in found]
    assert lengths == sorted(lengths, reverse=True)  # shorter sequences are another task
    words = [set(change.overrides) for change in found]
    assert {"memory.recompute=attention"} in words
    assert not any(one < other for one in words for other in words)  # none with more than it needs


def test_the_change_that_helps_most_is_faster_and_fits():
    devices = devices_named("8xh200")
    change = best_change("llama_8b_128k", ["memory.recompute=full"], devices)
    assert change is not None and change.plan.fits
    assert change.plan.tokens_per_second > plan("llama_8b_128k", ["memory.recompute=full"], devices).tokens_per_second


def test_the_longest_sequence_fits_and_a_longer_one_does_not():
    devices = devices_named("8xh200")
    found = longest("llama_8b_1m", [], devices)
    assert found is not None and found.fits
    length = found.recipe.data.length
    assert not plan("llama_8b_1m", [f"data.length={int(length * 1.04)}"], devices).fits
    assert longest("llama_70b_512k", ["parallel.rows=1"], devices_named("1xa100")) is None
    windows = ["layers.mixers.softmax.window=2047", "model.depth=2", "parallel.strategy=ring"]
    found = longest("softmax", windows, devices_named("1xh200"))  # a window of more than 1,024 tokens
    assert found is not None and found.recipe.data.length > 2**20
    with pytest.raises(UsageError, match="memory.recompute"):
        longest("softmax", ["memory.recompute=fill"], devices_named("1xh200"))


def test_the_search_proposes_what_fits_fastest_first():
    found = search("llama_8b_128k", ["trainer.sequences=2"], devices_named("4xh200"))
    assert found and all(change.plan.fits for change in found)
    speeds = [change.plan.tokens_per_second for change in found]
    assert speeds == sorted(speeds, reverse=True)
    assert len({change.overrides for change in found}) == len(found)
    with pytest.raises(UsageError, match="memory.recompute"):
        plan("llama_8b_128k", ["memory.recompute=fill"], devices_named("h200"))


def test_lists_of_operators_are_tried_with_the_whole_block():
    words = ["model.depth=2", "data.length=65536"]
    one = plan("llama_8b_128k", [*words, "memory.recompute=[attention]"], devices_named("2xh200")).shape
    both = plan("llama_8b_128k", [*words, "memory.recompute=[attention,aten::mm]"], devices_named("2xh200")).shape
    width, inner = 4096, 14336
    assert one.blocks[0].remembered == one.mixers[0].remembered - 2 * 2 * 1024  # a ring's last keys and values
    assert one.blocks[0].between <= 8
    assert both.blocks[0].remembered == one.blocks[0].remembered
    # In bfloat16: q, k and v, the projection out of attention, gate and up, and the projection out of the MLP.
    assert both.blocks[0].between == pytest.approx(2 * (width + 2 * 1024 + width + 2 * inner + width), rel=0.01)
    nothing = plan("llama_8b_128k", [*words, "memory.recompute=[conv1d]"], devices_named("2xh200"))
    full = plan("llama_8b_128k", [*words, "memory.recompute=full"], devices_named("2xh200"))
    assert nothing.memory.total == pytest.approx(full.memory.total, rel=0.03)
    assert nothing.times.mixing == full.times.mixing


def test_adam_of_8_bits_takes_a_quarter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # torchao, which a plan has no need of
    whole, eight = (
        plan("llama_8b_128k", [f"optimizer.adam={adam}"], devices_named("8xh200")).memory.terms["optimizer"]
        for adam in ("fused", "8bit")
    )
    assert eight == pytest.approx(whole / 4, rel=0.02)
