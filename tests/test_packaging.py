"""What `python -m build` makes is whole, and works outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = "trainer.steps=2 data.length=64 trainer.evaluate_sequences=1 model.width=32 model.depth=3".split()
ROOMS = ("kernels", "parallel", "recipes", "launch")  # top-level folders that are linked into the package


def run(*command: str | Path, cwd: Path, timeout: float = 120) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "VIRTUAL_"))}
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that `python -m build` makes (the wheel from the sdist), offline."""
    folder = tmp_path_factory.mktemp("build")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    for name in ("longtrain", *ROOMS):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", checkout, cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel; what longtrain needs is borrowed from this Python."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python"]
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel, cwd=venv)
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(paths))
    return venv


def expected_files() -> set[str]:
    """Every module and recipe of the checkout, by its path inside the package."""
    found = set()
    for room in ("longtrain", *ROOMS):
        for path in (ROOT / room).rglob("*"):
            inside = path.relative_to(ROOT).as_posix()
            if path.suffix in (".py", ".yaml") and not any(parent.is_symlink() for parent in path.parents):
                found.add(inside if room == "longtrain" else f"longtrain/{inside}")
    return found


def test_every_module_and_recipe_is_in_the_wheel(built: Path):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = expected_files()
    assert {"longtrain/recipes/base.yaml", "longtrain/launch/local.py", "longtrain/kernels/__init__.py"} <= expected
    assert expected - names == set()
    assert "longtrain/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"longtrain", f"{wheel.name.split('-py3')[0]}.dist-info"}


def test_the_sdist_has_what_the_wheel_is_made_from(built: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "longtrain/recipes/quickstart.yaml"} <= names


def test_the_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path):
    python = installed / "bin" / "python"
    where = run(python, "-c", "import longtrain, longtrain.parallel; print(longtrain.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run(installed / "bin" / "longtrain", "--version", cwd=tmp_path) == f"longtrain {project['version']}\n"
    run(installed / "bin" / "longtrain", "train", "quickstart", *TINY, "run_dir=a run", cwd=tmp_path)
    assert (tmp_path / "a run" / "summary.json").is_file()


def test_a_folder_named_like_an_inner_one_is_not_imported(installed: Path, tmp_path: Path):
    """Launchers set PYTHONSAFEPATH; and the package never imports a bare `kernels`."""
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise ImportError('the wrong one')")
    modules = ", ".join(f"longtrain.{room}" for room in ROOMS)
    run(installed / "bin" / "python", "-c", f"import {modules}", cwd=tmp_path)


def test_types_are_checked_in_every_room():
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["basedpyright"]["include"]
    assert {"longtrain", *(f"longtrain/{room}" for room in ROOMS if room != "recipes")} <= set(include)


def test_extras_and_ranges():
    """Ranges in pyproject.toml, exact versions in constraints.txt; torch with the triton that it needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *(need for extra in project["optional-dependencies"].values() for need in extra)]
    assert not [need for need in needs if "==" in need.partition(";")[0]]
    pinned = dict(line.split("==") for line in constraint_lines())
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")
    names = {need.partition(";")[0].partition(">")[0].strip() for need in needs}
    assert names - set(pinned) == set()


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_wheel_installs_from_nothing(built: Path, tmp_path: Path):
    """Downloads everything that longtrain needs into an empty environment."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    (wheel,) = built.glob("*.whl")
    pip = [tmp_path / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet"]
    run(*pip, wheel, "-c", ROOT / "constraints.txt", cwd=tmp_path, timeout=1500)
    run(tmp_path / "venv" / "bin" / "longtrain", "train", "quickstart", *TINY, "run_dir=run", cwd=tmp_path, timeout=300)
    assert (tmp_path / "run" / "summary.json").is_file()
