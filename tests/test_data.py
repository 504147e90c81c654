"""Packed sequences against a token-by-token account of them; sources, the held-out division, and every refusal."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.data import (
    BOUNDARY,
    VOCABULARY,
    BytesDocuments,
    DataConfig,
    FileDocuments,
    PackedSequences,
    build_data,
    decode,
    encode,
    split_held_out,
    stdlib_files,
    text_files,
)
from longtrain.errors import UsageError


def write_files(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def books(folder: Path, count: int = 40, size: int = 30) -> Path:
    return write_files(folder, {f"{i:02d}.txt": bytes([97 + i % 26]) * size for i in range(count)})


# ---- the vocabulary ----


def test_encode_and_decode_are_inverse() -> None:
    text = "Größe = 2 ≥ 1\n"
    tokens = encode(text)
    assert tokens.dtype == np.int64 and tokens.tolist() == list(text.encode())
    assert decode(np.concatenate(([BOUNDARY], tokens, [BOUNDARY]))) == text
    assert decode(np.array([0xC3])) == "\ufffd"
    with pytest.raises(ValueError, match=f"tokens: got {VOCABULARY}"):
        decode(np.array([65, VOCABULARY]))


# ---- packing ----


def account(contents: list[bytes], order: list[int], length: int) -> list[tuple[list[int], list[int], list[int]]]:
    """All sequences of one epoch as (tokens, labels, cu_seqlens), written token by token."""
    stream = []  # (token, label, starts a document)
    for document in order:
        row = [BOUNDARY, *contents[document], BOUNDARY]
        stream += [(row[i], row[i + 1], i == 0) for i in range(len(row) - 1)]
    sequences = []
    for start in range(0, len(stream) - length + 1, length):
        part = stream[start : start + length]
        starts = [i for i, (_, _, first) in enumerate(part) if first or i == 0]
        sequences.append(([token for token, _, _ in part], [label for _, label, _ in part], [*starts, length]))
    return sequences


@settings(max_examples=150, deadline=None)
@given(
    contents=st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=8),
    length=st.integers(1, 20),
    seed=st.none() | st.integers(0, 3),
)
def test_sequences_are_what_a_token_by_token_account_says(contents: list[bytes], length: int, seed: int | None) -> None:
    sequences = PackedSequences(BytesDocuments(contents), length, seed=seed)
    assert len(sequences) == sum(len(content) + 1 for content in contents) // length
    if len(sequences) == 0:
        with pytest.raises(ValueError, match="index: got 0"):
            sequences.sequence(0)
        return
    for epoch in range(2):
        made = [sequences.sequence(epoch * len(sequences) + i) for i in range(len(sequences))]
        # The order of an epoch is drawn; find it again from the object, and check below that it is an order at all.
        order = list(range(len(contents))) if seed is None else sequences._lay_out(epoch)[0].tolist()
        assert sorted(order) == list(range(len(contents)))
        expected = account(contents, order, length)
        assert len(made) == len(expected)
        for i, (sequence, (tokens, labels, cu_seqlens)) in enumerate(zip(made, expected, strict=True)):
            assert sequences.boundaries(epoch * len(sequences) + i).tolist() == cu_seqlens
            assert sequence.tokens.tolist() == tokens
            assert sequence.labels.tolist() == labels
            assert sequence.cu_seqlens.tolist() == cu_seqlens
            assert {sequence.tokens.dtype, sequence.labels.dtype, sequence.cu_seqlens.dtype} == {np.dtype(np.int64)}


def test_a_sequence_depends_on_its_index_alone() -> None:
    contents = [bytes([i]) * (i + 1) for i in range(20)]
    forward = PackedSequences(BytesDocuments(contents), 16, seed=5)
    there = [forward.sequence(i).tokens for i in range(3 * len(forward))]
    again = PackedSequences(BytesDocuments(contents), 16, seed=5)
    for i in reversed(range(3 * len(again))):
        assert np.array_equal(again.sequence(i).tokens, there[i])


def test_order_changes_with_epoch_and_seed_but_not_for_held_out_text() -> None:
    contents = [bytes([i]) * 7 for i in range(64)]

    def epoch(seed: int | None, number: int) -> bytes:
        sequences = PackedSequences(BytesDocuments(contents), 64, seed=seed)
        first = number * len(sequences)
        return np.concatenate([sequences.sequence(first + i).tokens for i in range(len(sequences))]).tobytes()

    assert len({epoch(0, 0), epoch(0, 1), epoch(1, 0), epoch(1, 1), epoch(None, 0)}) == 5
    assert epoch(None, 0) == epoch(None, 3)


def test_the_order_of_documents_is_the_same_in_every_version_of_numpy() -> None:
    # A checkpoint's data position means this order. If this fails, old checkpoints resume on other text.
    sequences = PackedSequences(BytesDocuments([bytes([i]) for i in range(8)]), 16, seed=1)
    assert sequences.sequence(2).tokens[1::2].tolist() == [5, 6, 3, 2, 1, 0, 4, 7]


def test_fingerprint_tells_other_text_length_and_seed() -> None:
    def fingerprint(contents: list[bytes], length: int = 4, seed: int | None = 0) -> str:
        return PackedSequences(BytesDocuments(contents), length, seed=seed).fingerprint

    assert fingerprint([b"ab", b"cd"]) == fingerprint([b"ab", b"cd"])
    others = [
        fingerprint([b"ab", b"cd"]),
        fingerprint([b"cd", b"ab"]),
        fingerprint([b"ab", b"cd"], length=5),
        fingerprint([b"ab", b"cd"], seed=1),
        fingerprint([b"ab", b"cd"], seed=None),
    ]
    assert len(set(others)) == len(others)


def test_impossible_arguments_are_refused() -> None:
    documents = BytesDocuments([b"abc"])
    with pytest.raises(ValueError, match="length: got 0"):
        PackedSequences(documents, 0, seed=0)
    with pytest.raises(ValueError, match="seed: got -1"):
        PackedSequences(documents, 2, seed=-1)
    with pytest.raises(ValueError, match="index: got -1"):
        PackedSequences(documents, 2, seed=0).sequence(-1)
    with pytest.raises(ValueError, match="empty document"):
        BytesDocuments([b"abc", b""])


# ---- files ----


def test_only_the_pieces_of_a_sequence_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 100_000
    write_files(tmp_path, {"a.txt": os.urandom(size), "b.txt": os.urandom(size)})
    documents = FileDocuments(text_files(str(tmp_path)))
    read = []
    original = FileDocuments.read

    def counted(self: FileDocuments, document: int, start: int, stop: int) -> np.ndarray:
        read.append(stop - start)
        return original(self, document, start, stop)

    monkeypatch.setattr(FileDocuments, "read", counted)
    PackedSequences(documents, 256, seed=0).sequence(300)
    assert 0 < sum(read) <= 257


def test_files_and_memory_give_the_same_sequences(tmp_path: Path) -> None:
    contents = {f"{i}/x.txt": os.urandom(1 + 17 * i) for i in range(9)}
    files = text_files(str(write_files(tmp_path, contents)))
    assert [file.name for file in files] == sorted(contents)
    from_files = PackedSequences(FileDocuments(files), 40, seed=3)
    from_memory = PackedSequences(BytesDocuments([contents[name] for name in sorted(contents)]), 40, seed=3)
    for i in range(2 * len(from_files)):
        one, other = from_files.sequence(i), from_memory.sequence(i)
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.labels, other.labels)


@pytest.mark.parametrize("change", ["shorter", "longer", "other", "gone"])
def test_a_file_that_changes_during_a_run_is_named(tmp_path: Path, change: str) -> None:
    documents = FileDocuments(text_files(str(write_files(tmp_path, {"a.txt": b"x" * 100}))))
    assert documents.read(0, 10, 20).tobytes() == b"x" * 10
    path = tmp_path / "a.txt"
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes({"shorter": b"y" * 15, "longer": b"y" * 101, "other": b"y" * 100}[change])
        os.utime(path, ns=(1, 1))  # a clock too coarse to tell would hide the change
    with pytest.raises(UsageError, match="a.txt"):
        documents.read(0, 10, 20)


def test_folder_glob_and_single_file(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {
            "one.txt": b"1",
            "deep/two.txt": b"2",
            "deep/three.md": b"3",
            "deep/er/four.txt": b"4",
            "empty.txt": b"",
            ".hidden": b"h",
            ".git/config": b"h",
            "deep/.cache/x.txt": b"h",
        },
    )
    (tmp_path / "deep" / "round").symlink_to(tmp_path, target_is_directory=True)  # a link in a circle

    def names(path: Path) -> list[str]:
        return [file.name for file in text_files(str(path))]

    assert names(tmp_path) == ["deep/er/four.txt", "deep/three.md", "deep/two.txt", "one.txt"]
    assert names(tmp_path / "*.txt") == ["one.txt"]
    assert names(tmp_path / "d*" / "*.txt") == ["deep/two.txt"]
    assert {"deep/er/four.txt", "deep/two.txt", "one.txt"} <= set(names(tmp_path / "**" / "*.txt"))
    assert names(tmp_path / "one.txt") == ["one.txt"]


def test_missing_empty_and_unreadable_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"data.path=.*nowhere does not exist"):
        text_files(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"nowhere does not exist"):
        text_files(str(tmp_path / "nowhere" / "*.txt"))
    write_files(tmp_path, {"books/empty.txt": b"", "books/.hidden": b"x"})
    for path in (tmp_path / "books", tmp_path / "books" / "*.html"):
        with pytest.raises(UsageError, match="no ordinary, non-empty files"):
            text_files(str(path))
    write_files(tmp_path, {"books/secret.txt": b"x"})
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("secret.txt"))  # root reads everything
    with pytest.raises(UsageError, match=r"secret.txt cannot be read: permission denied"):
        text_files(str(tmp_path / "books"))


# ---- the standard library ----


def test_stdlib_is_source_code_without_tests_and_installed_packages() -> None:
    files = stdlib_files()
    names = [file.name for file in files]
    assert names == sorted(names) and len(names) == len(set(names))
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    for folder in ("test", "tests", "site-packages", "idlelib", "__pycache__", "tkinter"):
        assert not [name for name in names if folder in name.split("/")]
    assert sum(file.size for file in files) > 3_000_000


# ---- what is held out ----


def test_held_out_files_are_chosen_by_the_hash_of_their_names(tmp_path: Path) -> None:
    files = text_files(str(books(tmp_path / "books", count=300)))
    training, held_out = split_held_out(files, 0.1)

    def number(name: str) -> int:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

    expected = sorted((file.name for file in files if number(file.name) < 0.1 * 2**64), key=number)
    assert [file.name for file in held_out] == expected and 10 < len(expected) < 60
    assert [file.name for file in training] == sorted({file.name for file in files} - set(expected))
    # Another place, another order and more files: what was held out still is.
    more = text_files(str(books(tmp_path / "elsewhere", count=400)))
    assert {file.name for file in split_held_out(more[::-1], 0.1)[1]} >= set(expected)


def test_two_files_are_enough_whatever_their_hashes(tmp_path: Path) -> None:
    for i in range(20):
        files = text_files(str(write_files(tmp_path / str(i), {f"a{i}": b"x", f"b{i}": b"y"})))
        for fraction in (0.01, 0.99):
            training, held_out = split_held_out(files, fraction)
            assert len(training) == len(held_out) == 1


def test_build_data_of_the_default_and_of_own_text(tmp_path: Path) -> None:
    training, held_out = build_data(DataConfig(), seed=0)
    assert isinstance(training, PackedSequences) and isinstance(held_out, PackedSequences)
    assert training.seed == 0 and held_out.seed is None
    names = [{file.name for file in side.documents.files} for side in (training, held_out)]  # pyright: ignore[reportAttributeAccessIssue] -- a Protocol; these are FileDocuments
    assert not names[0] & names[1]
    assert names[0] | names[1] == {file.name for file in stdlib_files()}
    share = held_out.tokens / (training.tokens + held_out.tokens)
    assert 0.05 < share < 0.2
    assert decode(held_out.sequence(0).tokens)

    books(tmp_path, count=40, size=30)
    training, held_out = build_data(DataConfig(source="text", path=str(tmp_path), length=31), seed=0)
    assert training.describe() == f"{len(training)} files, 0.0 MB, {len(training)} sequences of 31 tokens"
    assert len(training) + len(held_out) == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "stdlb"}, r"data\.source: got 'stdlb' \(nearest: 'stdlib'\)"),
        ({"source": "text"}, r"data\.path: got null, data=text needs"),
        ({"path": "/tmp"}, r"data\.path: got '/tmp' with data=stdlib, only data=text reads it"),
        ({"length": 0}, r"data\.length: got 0"),
        ({"held_out": 0.0}, r"data\.held_out: got 0\.0"),
        ({"held_out": 1.0}, r"data\.held_out: got 1\.0"),
        ({"source": "mqar"}, r"data\.pairs: got null, mqar needs it; data=mqar sets it"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_data(DataConfig(**change), seed=0)  # pyright: ignore[reportArgumentType] -- values of every type, on purpose


def test_too_little_text_names_a_length_that_works(tmp_path: Path) -> None:
    path = str(books(tmp_path / "many", count=40, size=30))
    with pytest.raises(
        UsageError, match=r"data.length=4096 is too long: the training text has \d+ files with \d+"
    ) as e:
        build_data(DataConfig(source="text", path=path, length=4096), seed=0)
    length = int(str(e.value).split("use data.length=")[1].split()[0])
    build_data(DataConfig(source="text", path=path, length=length), seed=0)
    with pytest.raises(UsageError, match=f"the held-out text .*use data.length={length} or less"):
        build_data(DataConfig(source="text", path=path, length=length + 1), seed=0)
    one = str(write_files(tmp_path / "one", {"a.txt": b"x" * 9000}))
    with pytest.raises(UsageError, match="give at least two files"):
        build_data(DataConfig(source="text", path=one, length=16), seed=0)
