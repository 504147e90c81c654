"""Makes .venv and installs longtrain into it, unless what is there is still right.

    python3 .ci/install.py          # what training needs
    python3 .ci/install.py test     # and the extra `test`

An installation is right while pyproject.toml, constraints.txt, Python's version and the folder are those it was made
with, every package it asks for is there, and no file of a package is missing. After a change pip brings it up to date;
one that is broken, or of another Python, is made anew. Run by the Makefile; needs the standard library only.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.json"

# Run by .venv's Python, with this repository's folder and the extras as arguments.
IS_WHOLE = """
import importlib.metadata, importlib.util, sys
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement

root, *extras = sys.argv[1:]
if Path(importlib.util.find_spec("longtrain").origin).resolve().parent != Path(root) / "longtrain":
    sys.exit("longtrain is imported from elsewhere")
for text in importlib.metadata.requires("longtrain"):
    need = Requirement(text)
    if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ["", *extras]):
        if not need.specifier.contains(importlib.metadata.version(need.name), prereleases=True):
            sys.exit(f"{text}: another version is installed")
for distribution in importlib.metadata.distributions():
    for file in distribution.files or []:
        if file.suffix != ".pyc" and not Path(distribution.locate_file(file)).exists():
            sys.exit(f"{file} is missing")
"""


def main(extras: list[str]) -> int:
    key = installation_key()
    known = installed_extras(key)
    wanted: list[str] = sorted({*extras, *(known or [])})
    if known == wanted and is_whole(wanted):
        print(f"==> {VENV.name}: the installation is still right", flush=True)
        return 0
    if usable() and not install(wanted):
        return 1
    if not is_whole(wanted):
        # There was none, or pip did not bring back files that are missing: it believes a package's metadata.
        print(f"==> {VENV.name}: a new virtual environment with Python {sys.version.split()[0]}", flush=True)
        if subprocess.call([sys.executable, "-m", "venv", "--clear", str(VENV)]):
            print("longtrain: could not make a virtual environment (on Debian and Ubuntu: apt install python3-venv)")
            return 1
        if not install(wanted):
            return 1
    STAMP.write_text(json.dumps({"key": key, "extras": wanted}))
    return 0


def install(extras: list[str]) -> bool:
    what = f".[{','.join(extras)}]" if extras else "."
    command = ["-m", "pip", "install", "-e", what, "-c", "constraints.txt"]
    print(f"==> {VENV.name}: python {' '.join(command)} (takes minutes the first time)", flush=True)
    return not subprocess.call([str(PYTHON), *command], cwd=ROOT)


def installation_key() -> str:
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    parts += [sys.version.encode(), str(ROOT).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def installed_extras(key: str) -> "list[str] | None":
    """The extras that a finished installation with this key has; None if there is no such installation."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return None
    return stamp["extras"] if stamp.get("key") == key else None


def is_whole(extras: list[str]) -> bool:
    if not usable():
        return False
    return not subprocess.run([str(PYTHON), "-P", "-c", IS_WHOLE, str(ROOT), *extras], capture_output=True).returncode


def usable() -> bool:
    """Whether .venv has a Python that runs, of the version that runs this, and pip."""
    question = "import sys, pip; print(sys.version)"
    try:
        answer = subprocess.run([str(PYTHON), "-c", question], capture_output=True, text=True)
    except OSError:
        return False
    return answer.returncode == 0 and answer.stdout.strip() == sys.version


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
