"""What `make` does before it runs anything: an installation that is right is kept, one that is not is mended."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """.ci/install.py for a copy of this checkout's metadata, with a .venv that borrows this Python's packages."""
    spec = importlib.util.spec_from_file_location("install", ROOT / ".ci" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "longtrain").mkdir()
    (tmp_path / "longtrain" / "__init__.py").touch()
    venv = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    borrowed = [str(tmp_path), str(packages / "own"), *(path for path in sys.path if path.endswith("site-packages"))]
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    (packages / "own" / "whole-1.0.dist-info").mkdir(parents=True)
    (packages / "own" / "whole.py").touch()
    (packages / "own" / "whole-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: whole\nVersion: 1.0\n"
    )
    (packages / "own" / "whole-1.0.dist-info" / "RECORD").write_text("whole.py,,\nwhole-1.0.dist-info/METADATA,,\n")
    for name, value in {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin/python",
        "STAMP": venv / "s.json",
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture
def commands(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that would have changed .venv, as `pip` with its target, or `venv`."""
    ran: list[str] = []

    def note(command: list[str], **options: object) -> int:
        ran.append(" ".join(["pip", command[command.index("-e") + 1]]) if "pip" in command else "venv")
        return 0

    monkeypatch.setattr(install.subprocess, "call", note)
    return ran


def test_a_right_installation_is_kept(install: ModuleType, commands: list[str]):
    assert install.main(["test"]) == 0 and commands == ["pip .[test]"]  # nobody knows how this .venv was made
    commands.clear()
    assert install.main(["test"]) == 0 and commands == []
    assert install.main([]) == 0 and commands == []  # what the tests need is more than what training needs


def test_an_extra_is_added(install: ModuleType, commands: list[str]):
    install.main([])
    install.main(["test"])
    assert commands == ["pip .", "pip .[test]"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_change_of_what_is_needed_is_installed(install: ModuleType, commands: list[str], name: str):
    install.main(["test"])
    (install.ROOT / name).write_text("# changed")
    install.main(["test"])
    assert commands == ["pip .[test]", "pip .[test]"]


def test_a_broken_environment_is_made_anew(install: ModuleType, commands: list[str]):
    install.main(["test"])
    commands.clear()
    (packages,) = install.VENV.glob("lib/python*/site-packages")
    (packages / "own" / "whole.py").unlink()
    install.main(["test"])
    assert commands == ["pip .[test]", "venv", "pip .[test]"]  # pip does not bring the file back
    commands.clear()
    (install.VENV / "bin" / "python").unlink()
    install.main(["test"])
    assert commands == ["venv", "pip .[test]"]


def test_a_failed_installation_is_not_taken_for_a_right_one(
    install: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as broken:
        broken.setattr(install.subprocess, "call", lambda command, **options: 1)
        assert install.main(["test"]) == 1
    assert commands == []
    assert install.main(["test"]) == 0 and commands == ["pip .[test]"]


def test_an_unreadable_stamp_is_no_stamp(install: ModuleType, commands: list[str]):
    install.STAMP.write_text("{")
    assert install.main([]) == 0 and commands == ["pip ."]
    assert json.loads(install.STAMP.read_text())["extras"] == []


def test_an_old_python_is_refused_in_one_line(tmp_path: Path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    ended = subprocess.run(["make", "-C", ROOT, "test", f"PYTHON={old}"], capture_output=True, text=True)
    assert ended.returncode != 0
    assert "longtrain needs Python 3.11 or newer" in ended.stdout


def test_hooks_run_what_make_test_runs():
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV_PYTHON)", ".venv/bin/python")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert len(hooks) == makefile.count(" -m ruff ") - 2  # `make format` has two of its own
    for hook in hooks:
        assert f"\t@{hook['entry'].removesuffix(' --force-exclude')}\n" in makefile
