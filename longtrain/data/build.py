"""The `data` part of a recipe: its keys, what is refused, and the sequences that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from longtrain.data.documents import FileDocuments, split_held_out
from longtrain.data.packing import PackedSequences, Sequences
from longtrain.data.recall import CopySequences, MqarSequences, PasskeySequences
from longtrain.data.sources import stdlib_files, text_files
from longtrain.data.vocabulary import VOCABULARY
from longtrain.errors import UsageError, nearest


@dataclass(frozen=True)
class DataConfig:
    """The `data` part of a recipe; its keys are explained in recipes/base.yaml.

    Keys that belong to some sources only are None with the others.
    """

    source: str = "stdlib"
    length: int = 4096
    held_out: float = 0.1
    path: str | None = None
    vocabulary: int | None = None
    pairs: Any = None  # a whole number or a list of them
    depth: float | None = None
    digits: int | None = None
    items: int | None = None
    selective: bool | None = None


def _mqar(config: DataConfig, seed: int | None) -> Sequences:
    pairs, vocabulary = _needed(config, "pairs"), _needed(config, "vocabulary")
    numbers = pairs if isinstance(pairs, list) else [pairs]
    if not all(type(number) is int for number in numbers):
        raise UsageError(f"data.pairs: got {pairs!r}, expected a whole number or a list of them such as [4, 8, 16]")
    return MqarSequences(config.length, pairs=numbers, vocabulary=vocabulary, seed=seed)


def _passkey(config: DataConfig, seed: int | None) -> Sequences:
    return PasskeySequences(config.length, digits=_needed(config, "digits"), depth=config.depth, seed=seed)


def _copy(config: DataConfig, seed: int | None) -> Sequences:
    return CopySequences(
        config.length,
        items=_needed(config, "items"),
        selective=_needed(config, "selective"),
        vocabulary=_needed(config, "vocabulary"),
        seed=seed,
    )


# Made-up tasks, which need no files: how to make them, and the keys that they have beside source and length.
_TASKS: dict[str, tuple[Callable[[DataConfig, int | None], Sequences], tuple[str, ...]]] = {
    "mqar": (_mqar, ("pairs", "vocabulary")),
    "passkey": (_passkey, ("digits", "depth")),
    "copy": (_copy, ("items", "selective", "vocabulary")),
}
_KEYS = {
    "stdlib": ("held_out",),
    "text": ("path", "held_out"),
    **{name: keys for name, (_, keys) in _TASKS.items()},
}
SOURCES = tuple(_KEYS)
_LARGEST_VOCABULARY = 2**20


def build_data(config: DataConfig, *, seed: int) -> tuple[Sequences, Sequences]:
    """Make (training, held-out) sequences of `config.length` tokens.

    Training sequences depend on `seed` (text is shuffled anew in every epoch by it); held-out ones never change and do
    not depend on it. Raises `UsageError` for a setting that cannot be met, for text that is missing or unreadable, and
    when either side has less than one sequence.
    """
    check_data(config)
    if config.source in _TASKS:
        make = _TASKS[config.source][0]
        return make(config, seed), make(config, None)
    training, held_out = text_documents(config.source, config.path, config.held_out)
    sequences = (
        PackedSequences(training, config.length, seed=seed),
        PackedSequences(held_out, config.length, seed=None),
    )
    for name, side in zip(("training", "held-out"), sequences, strict=True):
        if len(side) == 0:
            raise UsageError(_too_little(name, side, min(sequences[0].tokens, sequences[1].tokens), config))
    return sequences


def text_documents(source: str, path: str | None, held_out: float) -> tuple[FileDocuments, FileDocuments]:
    """(training, held-out) files of a source of text, "stdlib" or "text"; the others are `DataConfig`'s keys.

    Raises `UsageError` for text that is missing or unreadable.
    """
    files = stdlib_files() if source == "stdlib" else text_files(path or "")
    training, kept = split_held_out(files, held_out)
    return FileDocuments(training), FileDocuments(kept)


def vocabulary_of(config: DataConfig) -> int:
    """Number of token ids of a recipe's data, which is the vocabulary of its model."""
    return _TASKS[config.source][0](config, None).vocabulary if config.source in _TASKS else VOCABULARY


def check_data(config: DataConfig) -> None:
    """Refuse, without looking at any file, settings that cannot work, are unknown, or contradict one another.

    Raises:
        UsageError: one line with the key, what was given and what would work.
    """
    if config.source not in SOURCES:
        raise UsageError(
            f"data.source: got {config.source!r}{nearest(config.source, SOURCES)}, expected one of {', '.join(SOURCES)}"
        )
    if config.length < 1:
        raise UsageError(f"data.length: got {config.length}, expected 1 or more")
    for field in fields(DataConfig):
        given = getattr(config, field.name)
        if field.name in ("source", "length", *_KEYS[config.source]) or given == field.default:
            continue
        readers = [name for name in SOURCES if field.name in _KEYS[name]]
        only = " or ".join(f"data={name}" for name in readers)
        default = "null" if field.default is None else field.default
        raise UsageError(
            f"data.{field.name}: got {given!r} with data={config.source}, only {only} reads it; add that, or leave it "
            f"at {default}"
        )
    if not 0 < config.held_out < 1:
        raise UsageError(f"data.held_out: got {config.held_out}, expected a share between 0 and 1, such as 0.1")
    if config.source == "text" and not config.path:
        raise UsageError(
            f"data.path: got {config.path or 'null'}, data=text needs a folder or a glob of text files, such as "
            "data.path=notes/"
        )
    if config.source in _TASKS:
        if config.vocabulary is not None and config.vocabulary > _LARGEST_VOCABULARY:
            raise UsageError(f"data.vocabulary: got {config.vocabulary}, expected {_LARGEST_VOCABULARY} or less")
        try:
            _TASKS[config.source][0](config, None)
        except ValueError as error:
            raise UsageError(f"data.{error}") from error


def _needed(config: DataConfig, key: str) -> Any:
    value = getattr(config, key)
    if value is None:
        raise UsageError(f"data.{key}: got null, {config.source} needs it; data={config.source} sets it")
    return value


def _too_little(name: str, side: PackedSequences, longest: int, config: DataConfig) -> str:
    message = (
        f"data.length={config.length} is too long: the {name} text has {len(side.documents.sizes)} files with "
        f"{side.tokens} tokens in all, less than one sequence"
    )
    if longest == 0:  # one file only: files are held out whole
        return f"{message}; give at least two files, whole files are held out"
    return f"{message}; use data.length={longest} or less, or more text"
