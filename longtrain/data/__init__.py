"""Where sequences come from: text packed as bytes, or made-up tasks that measure recall."""

from __future__ import annotations

from longtrain.data.build import SOURCES, DataConfig, build_data, check_data, text_documents, vocabulary_of
from longtrain.data.documents import BytesDocuments, Documents, FileDocuments, TextFile, split_held_out
from longtrain.data.generated import GeneratedSequences
from longtrain.data.packing import PackedSequence, PackedSequences, Sequences
from longtrain.data.recall import CopySequences, MqarSequences, PasskeySequences
from longtrain.data.sources import stdlib_files, text_files
from longtrain.data.vocabulary import BOUNDARY, IGNORE, VOCABULARY, decode, encode

__all__ = [
    "BOUNDARY",
    "IGNORE",
    "SOURCES",
    "VOCABULARY",
    "BytesDocuments",
    "CopySequences",
    "DataConfig",
    "Documents",
    "FileDocuments",
    "GeneratedSequences",
    "MqarSequences",
    "PackedSequence",
    "PackedSequences",
    "PasskeySequences",
    "Sequences",
    "TextFile",
    "build_data",
    "check_data",
    "decode",
    "encode",
    "split_held_out",
    "stdlib_files",
    "text_documents",
    "text_files",
    "vocabulary_of",
]
