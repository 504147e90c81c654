"""House rules that no linter knows; CONTRIBUTING.md says why they are there. Who may import whom: pyproject.toml."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("longtrain", "kernels", "parallel", "launch")  # the package; the last three are linked into the first
# The entry points, each a program of its own, and what starts one may read the environment; whatever they call is told.
ENTRY_POINTS = {
    f"longtrain/{name}.py"
    for name in (
        *("train", "evaluation", "generation", "bare_loop", "bench_training", "cli"),
        *("dry_run/__main__", "dry_run/mixers", "dry_run/process"),
    )
}

Rule = Callable[[str, ast.Module], Iterator[str]]


def files(*folders: str) -> list[str]:
    """Python files below some folders, as paths from the root; links are not followed."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    inside = [path for path in found if not any(part.is_symlink() for part in path.parents)]
    return sorted(str(path.relative_to(ROOT)) for path in inside)


def dotted(node: ast.AST) -> str:
    """`torch.nn.Module` for the expression that reads so, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def names_used(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Full names of what a module imports and uses, through its import aliases, with the line."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                aliases[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
                yield f"{node.module}.{name.name}", node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (text := dotted(node)):
            first, _, rest = text.partition(".")
            if first in aliases:
                yield f"{aliases[first]}.{rest}", node.lineno


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def environment_is_read_at_the_entry_points(path: str, tree: ast.Module) -> Iterator[str]:
    if path in ENTRY_POINTS or path.startswith("launch/") or path.startswith(("tests/", ".ci/")):
        return
    for name, line in names_used(tree):
        if re.match(r"os\.(environb?|getenvb?|putenv)\b", name):
            yield f"{path}:{line} reads the environment ({name}); take an argument instead"


def kernels_know_no_process_group_and_no_module(path: str, tree: ast.Module) -> Iterator[str]:
    if not path.startswith("kernels/"):
        return
    for name, line in names_used(tree):
        if re.match(r"torch\.(distributed\b|nn\.(?!functional\b)\w)", name):
            yield f"{path}:{line} uses {name}; kernels are one device's arithmetic on tensors"


def messages_are_sent_in_one_file(path: str, tree: ast.Module) -> Iterator[str]:
    if not path.startswith("parallel/") or path in ("parallel/communication.py", "parallel/mesh.py"):
        return
    types = r"(ProcessGroup|Work|device_mesh\.DeviceMesh|DeviceMesh|device_mesh)$"
    for name, line in names_used(tree):
        if match := re.match(r"torch\.distributed\.(.+)", name):
            if not re.match(types, match[1]):
                yield f"{path}:{line} uses {name}; only parallel/communication.py talks to other ranks"


def nothing_is_cached_per_rank(path: str, tree: ast.Module) -> Iterator[str]:
    if not path.startswith("parallel/"):
        return
    for name, line in names_used(tree):
        if re.match(r"functools\.(lru_cache|cache)\b", name):
            yield f"{path}:{line} uses {name}; ranks would differ and memory would grow; keep it on the shard"


def files_are_short(path: str, tree: ast.Module) -> Iterator[str]:
    limit = 600 if Path(path).name.startswith("triton_") else 400
    lines = tree.body[-1].end_lineno or 0 if tree.body else 0
    if lines > limit:
        yield f"{path} has {lines} lines; {limit} is the limit"


def functions_are_short(path: str, tree: ast.Module) -> Iterator[str]:
    for function in functions(tree):
        # A kernel's parameters stand on a line each, and there are many.
        start = function.body[0].lineno if Path(path).name.startswith("triton_") else function.lineno
        lines = (function.end_lineno or 0) - start + 1
        if lines > 100:
            yield f"{path}:{function.lineno} {function.name} has {lines} lines; 100 is the limit"


def public_functions_name_their_options(path: str, tree: ast.Module) -> Iterator[str]:
    # checks take tensors by the names in their messages, launch a kernel's constants by theirs
    if path.startswith("tests/") or path in ("kernels/checks.py", "kernels/launching.py"):
        return
    for function in functions(tree):
        if function.args.kwarg is not None and not function.name.startswith("_"):
            yield f"{path}:{function.lineno} {function.name} takes **{function.args.kwarg.arg}; name the options"


RULES: list[Rule] = [
    environment_is_read_at_the_entry_points,
    kernels_know_no_process_group_and_no_module,
    messages_are_sent_in_one_file,
    nothing_is_cached_per_rank,
    files_are_short,
    functions_are_short,
    public_functions_name_their_options,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_rule(rule: Rule):
    broken = []
    for path in files(*FOLDERS, "tests", ".ci"):
        broken += rule(path, ast.parse((ROOT / path).read_text(encoding="utf-8")))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("rule", "path", "code", "breaks"),
    [
        (RULES[0], "longtrain/model.py", "import os\nx = os.environ['A']", True),
        (RULES[0], "longtrain/data/text.py", "from os import getenv", True),
        (RULES[0], "parallel/ring.py", "import os as system\nsystem.environ.get('A')", True),
        (RULES[0], "longtrain/train.py", "import os\nx = os.environ['A']", False),
        (RULES[0], "longtrain/model.py", "import os\nos.path.join('a')", False),
        (RULES[1], "kernels/a.py", "import torch\nclass A(torch.nn.Module): pass", True),
        (RULES[1], "kernels/a.py", "from torch import distributed as dist", True),
        (RULES[1], "kernels/a.py", "from torch.nn import functional as F\nF.silu", False),
        (RULES[1], "longtrain/layers/a.py", "from torch import nn\nnn.Module", False),
        (RULES[2], "parallel/ring.py", "import torch.distributed as dist\ndist.all_reduce(x)", True),
        (RULES[2], "parallel/ring.py", "from torch.distributed import all_reduce", True),
        (RULES[2], "parallel/ring.py", "from torch.distributed import ProcessGroup", False),
        (RULES[2], "parallel/communication.py", "import torch.distributed as dist\ndist.all_reduce(x)", False),
        (RULES[3], "parallel/a.py", "import functools\n@functools.lru_cache\ndef f(): pass", True),
        (RULES[3], "parallel/a.py", "from functools import cache", True),
        (RULES[3], "parallel/a.py", "from functools import cached_property", False),
        (RULES[4], "longtrain/a.py", "\n" * 400 + "x = 1", True),
        (RULES[4], "longtrain/a.py", "\n" * 399 + "x = 1", False),
        (RULES[4], "kernels/triton_a.py", "\n" * 599 + "x = 1", False),
        (RULES[5], "longtrain/a.py", "def f():\n" + "    x = 1\n" * 100, True),
        (RULES[5], "longtrain/a.py", "def f():\n" + "    x = 1\n" * 99, False),
        (RULES[5], "kernels/triton_a.py", "def f(\n" + "    x,\n" * 100 + "):\n    x = 1", False),
        (RULES[6], "longtrain/a.py", "def f(**options): pass", True),
        (RULES[6], "longtrain/a.py", "def f(*, a=1): pass\ndef _g(**options): pass", False),
    ],
)
def test_house_rules_notice(rule: Rule, path: str, code: str, breaks: bool):
    assert bool(list(rule(path, ast.parse(code)))) == breaks


def test_recipes_name_no_python_objects():
    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert "_target_" not in recipe.read_text(encoding="utf-8"), recipe
