"""Where text comes from: the Python standard library, or a folder or glob of the user's own files."""

from __future__ import annotations

import glob
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from longtrain.data.documents import TextFile
from longtrain.errors import UsageError

# Trees of the standard library that some distributions leave out or ship apart (tests, Tk and what needs it, the
# old packaging tools), what is not part of it, and pydoc_data, which is no code but one long text that is generated
# from the manual. Without them two machines with the same Python have the same text.
_LEFT_OUT_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
    }
)
# Written when this Python was built or installed: build settings, and a distribution's own hooks.
_LEFT_OUT_STARTS = ("_sysconfigdata", "config-", "_distutils_", "sitecustomize", "usercustomize")


def stdlib_files() -> list[TextFile]:
    """List the source files of the running Python's standard library, by relative path: real text on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    try:
        names = [
            name
            for name in _walk(root)
            if name.endswith(".py")
            and not _LEFT_OUT_FOLDERS.intersection(name.split("/"))
            and not any(part.startswith(_LEFT_OUT_STARTS) for part in name.split("/"))
        ]
    except OSError as error:
        raise UsageError(f"data.source=stdlib: {root} cannot be read: {error.strerror or error}") from error
    files = _stat_all(root, names)
    if not files:
        version = ".".join(map(str, sys.version_info[:2]))
        raise UsageError(
            f"data.source=stdlib: this Python {version} has no source files in {root}; "
            "use your own text with data.source=text data.path=FOLDER"
        )
    return files


def text_files(path: str) -> list[TextFile]:
    """List the text files of a folder (with all folders below), of a glob, or one file, by relative path.

    Names that begin with a dot are left out, and so are empty files. Names are relative to the folder, or to the part
    of a glob before its first wildcard. Raises `UsageError` when there is nothing, or something cannot be read.
    """
    given = Path(path).expanduser()
    asked = f"data.path={path}"
    try:
        if given.is_dir():
            root, names = given, _walk(given)
        elif given.exists():
            root, names = given.parent, iter([given.name])
        elif glob.has_magic(path):
            root, names = _match(given)
            if not root.is_dir():
                raise UsageError(f"{asked}: the folder {root} does not exist; give a folder or a glob of text files")
            os.listdir(root)  # a glob passes over a folder that it may not read
        else:
            raise UsageError(f"{asked} does not exist; give a folder or a glob of text files")
        files = _stat_all(root, list(names))
    except OSError as error:
        raise UsageError(f"{asked}: {error.filename or given} cannot be read: {error.strerror or error}") from error
    if not files:
        raise UsageError(
            f"{asked} has no ordinary, non-empty files (hidden ones are left out; in a glob ** stands for folders at "
            "any depth, as in 'books/**/*.txt')"
        )
    return files


def _walk(root: Path) -> Iterator[str]:
    """Names of all files below a folder, through links to folders too, each real folder once."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    for folder, below, files in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in sorted(files))


def _match(pattern: Path) -> tuple[Path, Iterator[str]]:
    """The folder before a glob's first wildcard, and the names below it that match."""
    parts = pattern.parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    return root, glob.iglob(str(Path(*parts[fixed:])), root_dir=root, recursive=True)


def _stat_all(root: Path, names: list[str]) -> list[TextFile]:
    """The ordinary, non-empty, not hidden files among names, sorted by name; refuses unreadable ones."""
    files = []
    for name in sorted(set(names)):
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        path = root / name
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            continue
        if not os.access(path, os.R_OK):
            raise PermissionError(13, "permission denied", str(path))
        files.append(TextFile(path, Path(name).as_posix(), status.st_size, status.st_mtime_ns))
    return files
