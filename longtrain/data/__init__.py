"""Text as packed sequences of bytes: where it comes from, what is held out, how documents are laid into sequences."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from longtrain.data.documents import BytesDocuments, Documents, FileDocuments, TextFile, split_held_out
from longtrain.data.packing import PackedSequence, PackedSequences
from longtrain.data.sources import stdlib_files, text_files
from longtrain.data.vocabulary import BOUNDARY, IGNORE, VOCABULARY, decode, encode
from longtrain.errors import UsageError

__all__ = [
    "BOUNDARY",
    "IGNORE",
    "SOURCES",
    "VOCABULARY",
    "BytesDocuments",
    "DataConfig",
    "Documents",
    "FileDocuments",
    "PackedSequence",
    "PackedSequences",
    "TextFile",
    "build_data",
    "decode",
    "describe",
    "encode",
    "split_held_out",
    "stdlib_files",
    "text_files",
]

SOURCES = ("stdlib", "text")


@dataclass(frozen=True)
class DataConfig:
    """The `data` part of a recipe; its keys are explained in recipes/base.yaml."""

    source: str = "stdlib"
    path: str | None = None
    length: int = 4096
    held_out: float = 0.1


def build_data(config: DataConfig, *, seed: int) -> tuple[PackedSequences, PackedSequences]:
    """Make (training, held-out) sequences of `config.length` tokens.

    Training sequences are shuffled anew in every epoch by `seed`; held-out ones never change and do not depend on it.
    Raises `UsageError` for a setting that cannot be met, for text that is missing or unreadable, and when either side
    has less than one sequence.
    """
    _check(config)
    if config.source == "stdlib":
        files = stdlib_files()
    else:
        files = text_files(config.path or "")
    training, held_out = split_held_out(files, config.held_out)
    sequences = (
        PackedSequences(FileDocuments(training), config.length, seed=seed),
        PackedSequences(FileDocuments(held_out), config.length, seed=None),
    )
    for name, side in zip(("training", "held-out"), sequences, strict=True):
        if len(side) == 0:
            raise UsageError(_too_little(name, side, min(sequences[0].tokens, sequences[1].tokens), config))
    return sequences


def describe(sequences: PackedSequences) -> str:
    """Say in a few words what there is: '412 files, 8.3 MB, 2,031 sequences of 4,096 tokens'."""
    sizes = sequences.documents.sizes
    text = f"{len(sizes):,} files, {sizes.sum() / 1e6:,.1f} MB"
    return f"{text}, {len(sequences):,} sequences of {sequences.length:,} tokens"


def _check(config: DataConfig) -> None:
    if config.source not in SOURCES:
        near = difflib.get_close_matches(config.source, SOURCES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(SOURCES)}"
        raise UsageError(f"data.source={config.source} is not known; {hint}")
    if config.source == "text" and not config.path:
        raise UsageError("data.source=text needs data.path, a folder or a glob of text files")
    if config.source != "text" and config.path is not None:
        raise UsageError(f"data.path={config.path} is only read with data.source=text, not {config.source}")
    if config.length < 1:
        raise UsageError(f"data.length={config.length} is not possible; use 1 token or more")
    if not 0 < config.held_out < 1:
        raise UsageError(f"data.held_out={config.held_out} is not possible; use a fraction above 0 and below 1")


def _too_little(name: str, side: PackedSequences, longest: int, config: DataConfig) -> str:
    message = (
        f"data.length={config.length} is too long: the {name} text has {len(side.documents.sizes)} files with "
        f"{side.tokens} tokens in all, less than one sequence"
    )
    if longest == 0:  # one file only: files are held out whole
        return f"{message}; give at least two files, whole files are held out"
    return f"{message}; use data.length={longest} or less, or more text"
