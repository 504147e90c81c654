"""Checkpoints in one process: all or nothing when killed, and a clear line for any damage."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain import checkpoint
from longtrain.checkpoint import format as checkpoint_format
from longtrain.checkpoint import writing
from longtrain.errors import UsageError

NUMBERS = {"step": 100, "position": 12345678901, "loss": 0.1, "rng": [[1, 2**63], None], "by_rank": {2: "b", 10: "a"}}
NUMBERS_READ = {**NUMBERS, "by_rank": {"2": "b", "10": "a"}}  # JSON's keys are text


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(5, 3, generator=generator), "b": torch.randn(4, generator=generator)}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    folder = checkpoint.step_folder(tmp_path, 7)
    checkpoint.save(folder, tensors=tensors, numbers=NUMBERS)
    return folder


def damage(path: Path, at: int = -3) -> None:
    """Turn over one bit; the size stays."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_a_save_killed_at_any_moment_is_whole_or_not_there(
    tmp_path: Path, folder: Path, tensors: dict[str, Tensor], calls: int
) -> None:
    """Kill at each flush: of the shard, the manifest, the hidden folder, and, after the renaming, the parent."""
    newer = checkpoint.step_folder(tmp_path, 8)
    child = os.fork()
    if child == 0:
        left = [calls]

        def flush_or_die(path: Path) -> int:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return path.stat().st_size

        writing._flush = flush_or_die
        checkpoint.save(newer, tensors=tensors, numbers=NUMBERS)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    hidden = newer.with_name(".step-00000008.writing")
    if calls < 4:
        assert checkpoint.latest(tmp_path) == folder and hidden.exists()
        checkpoint.save(newer, tensors=tensors, numbers=NUMBERS)  # the left-over is no hindrance
    assert not hidden.exists()
    assert checkpoint.latest(tmp_path) == newer
    assert_same(checkpoint.read_tensors(newer), tensors)


def test_old_checkpoints_and_leftovers_are_pruned(tmp_path: Path, folder: Path, tensors: dict[str, Tensor]) -> None:
    assert checkpoint.latest(tmp_path / "elsewhere") is None
    checkpoint.prune(tmp_path / "elsewhere", 1)
    for step in (9, 100000000, 99999999):  # nine digits come after eight, not as text does
        checkpoint.save(checkpoint.step_folder(tmp_path, step), tensors=tensors, numbers={})
    parent = folder.parent
    for name in (".step-00000012.writing", ".step-00000003.removing", "notes"):
        (parent / name).mkdir()
        (parent / name / "x").touch()
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in parent.iterdir()) == ["notes", "step-100000000", "step-99999999"]
    assert checkpoint.latest(tmp_path) == parent / "step-100000000"
    with pytest.raises(ValueError, match="keep: got 0"):
        checkpoint.prune(tmp_path, 0)


def test_nothing_of_a_checkpoint_is_pickled(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    json.loads((folder / "manifest.json").read_text())
    header = int.from_bytes((folder / "rank-00000.safetensors").read_bytes()[:8], "little")
    json.loads((folder / "rank-00000.safetensors").read_bytes()[8 : 8 + header])


def test_saving_leaves_the_tensors_as_they_are(folder: Path, tensors: dict[str, Tensor]) -> None:
    # FSDP frees gathered weights by resizing their storage, which one look through numpy forbids for good.
    assert all(tensor.untyped_storage().resizable() for tensor in tensors.values())


def test_a_checkpoint_is_never_overwritten(folder: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError, match="exists already"):
        checkpoint.save(folder, tensors={"a": torch.zeros(1)}, numbers={})
    assert_same(checkpoint.read_tensors(folder), tensors)


def test_an_unwritable_place_is_one_line(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        checkpoint.save(tmp_path / "file" / "step-00000001", tensors=tensors, numbers={})


@pytest.mark.parametrize("numbers", [{"x": object()}, {"x": float("nan")}])
def test_numbers_that_json_cannot_hold_are_refused_before_anything_is_written(
    tmp_path: Path, tensors: dict[str, Tensor], numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "save_file", lambda *_: pytest.fail("gigabytes were written first"))
    with pytest.raises((TypeError, ValueError), match="JSON"):
        checkpoint.save(tmp_path / "step-00000001", tensors=tensors, numbers=numbers)
    assert not list(tmp_path.iterdir())


def check_refused(folder: Path, tensors: dict[str, Tensor], *parts: str) -> None:
    for call in (
        lambda: checkpoint.load(folder, into={name: torch.zeros_like(tensor) for name, tensor in tensors.items()}),
        lambda: checkpoint.read_tensors(folder),
    ):
        with pytest.raises(UsageError) as refusal:
            call()
        for part in parts:
            assert part in str(refusal.value)


SHARD = "rank-00000.safetensors"


@pytest.mark.parametrize("at", [-3, 0, 20, 120])
def test_one_turned_bit_in_a_shard_is_found(folder: Path, tensors: dict[str, Tensor], at: int) -> None:
    damage(folder / SHARD, at)  # in the numbers, in the header's length, in the header
    check_refused(folder, tensors, "damaged", str(folder / SHARD))


def test_a_truncated_missing_or_exchanged_shard_is_found(folder: Path, tensors: dict[str, Tensor]) -> None:
    path = folder / SHARD
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    check_refused(folder, tensors, "damaged", str(path), f"{len(content) - 10} bytes instead of {len(content)}")
    path.unlink()
    check_refused(folder, tensors, "damaged", str(path), "missing")
    other = folder.with_name("step-00000008")
    checkpoint.save(other, tensors={name: tensor + 1 for name, tensor in tensors.items()}, numbers={})
    (other / SHARD).rename(path)
    check_refused(folder, tensors, "damaged", str(path), "checksum of a")


def test_a_damaged_or_missing_manifest_is_found(folder: Path, tensors: dict[str, Tensor]) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"step": 100', '"step": 101'))
    check_refused(folder, tensors, "damaged", str(path), "checksum")
    path.write_text(text[: len(text) // 2])
    check_refused(folder, tensors, "damaged", str(path), "JSON")
    path.unlink()
    check_refused(folder, tensors, "not a longtrain checkpoint: it has no manifest.json")
    check_refused(folder.with_name("nowhere"), tensors, "not a longtrain checkpoint: there is no such folder")


def test_a_foreign_or_newer_manifest_is_refused(folder: Path, tensors: dict[str, Tensor]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for foreign in ([], {}, {"weight_map": {}}):
        path.write_text(json.dumps(foreign))
        check_refused(folder, tensors, "not a longtrain checkpoint", "another format")
    path.write_text(json.dumps({**manifest, "version": 99}))
    check_refused(folder, tensors, "version 99", "reads version 1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../step-00000008/rank-00000.safetensors"),
        ("rows", 4),
        ("extra", 1),
        ("dtype", "load"),
        ("pieces", []),
    ],
)
def test_a_manifest_that_was_made_up_does_no_harm(
    folder: Path, tensors: dict[str, Tensor], key: str, value: object
) -> None:
    """With a right checksum but a path that leads elsewhere, missing rows, and names that are no dtypes."""
    checkpoint.save(folder.with_name("step-00000008"), tensors=tensors, numbers={})
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    entry = manifest["content"]["tensors"]["a"]
    if key == "file":
        manifest["content"]["files"][value] = (folder / str(value)).stat().st_size
    (entry if key in entry else entry["pieces"][0])[key] = value
    manifest["crc32"] = checkpoint_format.zlib.crc32(checkpoint_format.canonical(manifest["content"]).encode())
    path.write_text(json.dumps(manifest))
    check_refused(folder, tensors, "damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": torch.zeros(1), "d": torch.zeros(1)}, r"lacks c, d; "),
        ({"a": None}, r"has, and this model does not, a; "),
        ({"a": torch.zeros(3, 5)}, r"has a as float32 \[5, 3\], this model as float32 \[3, 5\]"),
        ({"b": torch.zeros(4, dtype=torch.float64)}, r"has b as float32 \[4\], this model as float64 \[4\]"),
        ({str(i): torch.zeros(1) for i in range(5)}, r"lacks 0, 1, 2 and 2 more"),
    ],
)
def test_another_model_is_refused_with_nothing_overwritten(
    folder: Path, tensors: dict[str, Tensor], change: dict[str, Tensor | None], message: str
) -> None:
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    given = {name: tensor for name, tensor in {**into, **change}.items() if tensor is not None}
    with pytest.raises(UsageError, match=message):
        checkpoint.load(folder, into=given)
    assert not any(tensor.any() for tensor in into.values())
    with pytest.raises(UsageError, match="has no tensor c"):
        checkpoint.read_tensors(folder, names=["c"])
