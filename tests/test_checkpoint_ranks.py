"""Checkpoints over ranks: bitwise the same at every world size, and no rank left waiting for another's failure."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from longtrain import checkpoint
from longtrain.checkpoint import writing
from longtrain.errors import UsageError
from tests.distributed import RankFailed, run_distributed
from tests.test_checkpoint import NUMBERS, NUMBERS_READ, assert_same, damage

# ---- FSDP2 models whose rows divide by nothing ----


def training_state(world: int, seed: int) -> dict[str, Tensor]:
    """Parameters and AdamW's state of a sharded model after a step: uneven shards, empty ones, scalars, replicas."""
    torch.manual_seed(seed)
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 1))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 7)).square().sum().backward()
    optimizer.step()
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    generator = torch.Generator().manual_seed(seed)
    replicated = torch.randn(3, 2, generator=generator)
    tensors["replicated"] = distribute_tensor(replicated, mesh, [Replicate()])
    tensors["half"] = torch.randn(4, 6, generator=generator).to(torch.bfloat16).t()  # not contiguous
    tensors["rng"] = torch.randint(0, 256, (11,), generator=generator, dtype=torch.uint8)
    tensors["flag"] = torch.tensor([True, False]) if seed else torch.tensor([False, True])
    tensors["nothing"] = torch.empty(0, 3)
    tensors["tied"] = tensors["rng"]  # one storage under two names
    return tensors


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def save_state(rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    tensors = training_state(world, seed=0)
    checkpoint.save(folder, tensors=tensors, numbers=NUMBERS if rank == 0 else {})
    return whole(tensors)


def load_state(rank: int, world: int, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = training_state(world, seed=1)
    numbers = checkpoint.load(folder, into=tensors)
    return numbers, whole(tensors)


@pytest.mark.parametrize("saved_at", [2, 4])
def test_what_was_saved_is_loaded_bitwise_at_every_world_size(tmp_path: Path, saved_at: int) -> None:
    folder = checkpoint.step_folder(tmp_path, 100)
    saved = run_distributed(saved_at, save_state, folder)[0]
    for world in (1, 2, 4):
        for numbers, loaded in run_distributed(world, load_state, folder):
            assert numbers == NUMBERS_READ
            assert_same(loaded, saved)
    # And by one process alone, with nothing distributed.
    assert_same(checkpoint.read_tensors(folder), saved)
    assert_same(
        checkpoint.read_tensors(folder, prefix="model.0."),
        {name: saved[name] for name in ("model.0.weight", "model.0.bias")},
    )
    assert_same(checkpoint.read_tensors(folder, names=["rng"]), {"rng": saved["rng"]})
    assert checkpoint.read_numbers(folder) == NUMBERS_READ
    # Every rank wrote a shard of its own, and the files are no bigger than what is in them, once.
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    content = sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
    assert content <= sum(sizes) < content + 4096 * saved_at
    assert len(sizes) == saved_at if saved_at == 2 else len(sizes) == 3  # of 5, 3 and 1 rows rank 3 gets none


def save_on_two_dimensions(rank: int, world: int, folder: Path) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    value = torch.arange(15.0).reshape(5, 3)
    checkpoint.save(folder, tensors={"x": distribute_tensor(value, mesh, [Replicate(), Shard(0)])}, numbers={})
    refused = []
    for placements in ([Replicate(), Shard(1)], [Shard(0), Shard(0)]):
        tensor = distribute_tensor(value, mesh, placements)
        try:
            checkpoint.save(folder.with_name("other"), tensors={"x": tensor}, numbers={})
        except ValueError as error:
            refused.append(str(error))
    return refused


def test_a_tensor_sharded_and_replicated_is_written_once_and_other_placements_are_refused(tmp_path: Path) -> None:
    refused = run_distributed(4, save_on_two_dimensions, tmp_path / "step-00000001")[0]
    read = checkpoint.read_tensors(tmp_path / "step-00000001")
    assert torch.equal(read["x"], torch.arange(15.0).reshape(5, 3))
    assert len(list((tmp_path / "step-00000001").glob("*.safetensors"))) == 2
    assert len(refused) == 2 and all("tensors: x is placed" in message for message in refused)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# ---- failures on one rank ----


def fail_on_rank_1(rank: int, world: int, folder: Path, error: Exception) -> tuple[str, str]:
    """Save with rank 1's disk in trouble; then everything once more, to see that the ranks are still in step."""
    kept = writing.save_file
    if rank == 1:

        def fail(*_: object) -> None:
            raise error

        writing.save_file = fail
    tensors = training_state(world, seed=0)
    try:
        checkpoint.save(folder, tensors=tensors, numbers={})
        raised = ("nothing", "")
    except Exception as caught:
        raised = (type(caught).__name__, str(caught))
    finally:
        writing.save_file = kept
    assert not folder.exists() and not folder.with_name(f".{folder.name}.writing").exists()
    dist.barrier()
    checkpoint.save(folder, tensors=tensors, numbers={})
    return raised


def test_a_full_disk_under_one_rank_is_said_by_all(tmp_path: Path) -> None:
    folder = checkpoint.step_folder(tmp_path, 1)
    raised = run_distributed(2, fail_on_rank_1, folder, OSError(28, "No space left on device"), timeout=20)
    assert raised[0] == raised[1] and raised[0][0] == "UsageError"
    assert str(folder) in raised[0][1] and "No space left" in raised[0][1]
    assert checkpoint.latest(tmp_path) == folder


def test_a_defect_under_one_rank_ends_all(tmp_path: Path) -> None:
    raised = run_distributed(2, fail_on_rank_1, tmp_path / "step-00000001", KeyError("defect"), timeout=20)
    assert raised[0][0] == "RuntimeError" and "rank 1 failed: 'defect'" in raised[0][1]
    assert raised[1] == ("KeyError", "'defect'")


def load_damaged(rank: int, world: int, folder: Path) -> str:
    tensors = training_state(world, seed=1)
    try:
        checkpoint.load(folder, into=tensors)
        return "nothing"
    except UsageError as error:
        return str(error)


def test_damage_that_one_rank_alone_sees_is_refused_by_all(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    run_distributed(2, save_state, folder)
    damage(folder / "rank-00001.safetensors")
    messages = run_distributed(2, load_damaged, folder, timeout=20)
    assert messages[0] == messages[1] and "rank-00001.safetensors" in messages[0]


def disagree(rank: int, world: int, folder: Path) -> list[str]:
    messages = []
    for tensors in (
        {f"name{rank}": torch.zeros(2)},
        {"x": torch.zeros(2 + rank)},
        {"x": torch.zeros(2, dtype=(torch.float32, torch.float64)[rank])},
    ):
        try:
            checkpoint.save(folder, tensors=tensors, numbers={})
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    return messages


def test_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    for messages in run_distributed(2, disagree, tmp_path / "step-00000001"):
        for message, part in zip(messages, ("name0", "(2,)", "float64"), strict=True):
            assert part in message
    assert not list(tmp_path.iterdir())


def kill_rank_1(rank: int, world: int, folder: Path) -> None:
    if rank == 1:
        writing.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save(folder, tensors=training_state(world, seed=0), numbers={})


def test_a_rank_killed_in_a_save_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    older = checkpoint.step_folder(tmp_path, 1)
    run_distributed(2, save_state, older)
    with pytest.raises(RankFailed, match="rank 1 of 2 failed in kill_rank_1: died with exit code -9"):
        run_distributed(2, kill_rank_1, checkpoint.step_folder(tmp_path, 2), timeout=20)
    assert checkpoint.latest(tmp_path) == older
    checkpoint.read_tensors(older)
