"""What the compiler makes of a kernel: registers, spills, shared memory, tensor-core instructions; without a card.

Triton compiles for any architecture wherever it is installed. A launch that was recorded instead of run
(`longtrain.kernels.launching.recording`) has all that the compiler wants to know.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtrain import kernels
from longtrain.kernels.launching import Launch, recording

# The most shared memory of one program, bytes (CUDA programming guide, table of technical specifications; CDNA3 ISA).
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

_DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes. registers: of a thread; spills, shared: bytes."""

    registers: int
    spills: int
    shared: int
    tensor_cores: str  # the matrix instructions in it: "wgmma", "mma", "tcgen05", "mfma" or "none"
    halves: bool  # whether it takes tensors in half precision


def compile_launch(launch: Launch, architecture: str) -> Resources:
    """Compile a recorded launch for "sm_80", "sm_90", "sm_100" or "gfx942" and read its resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    hip = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if hip else GPUTarget("cuda", int(architecture[3:]), 32)
    signature, constants, attributes = _specialised(launch)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    halves = any(isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in launch.args)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    if hip:
        text = compiled.asm["amdgcn"]
        spills = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        return Resources(registers, spills, compiled.metadata.shared, "mfma" if "v_mfma" in text else "none", halves)
    registers, stack = _usage(compiled.asm["cubin"])
    assembly = compiled.asm["ptx"]
    found = [name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync") if name in assembly]
    kind = {"tcgen05.mma": "tcgen05", "wgmma.mma": "wgmma", "mma.sync": "mma"}[found[0]] if found else "none"
    return Resources(registers, stack, compiled.metadata.shared, kind, halves)


def operators() -> list[str]:
    """The operators that have Triton kernels: the folders of `kernels/` with a list of what ships, `shipped.py`."""
    return sorted(path.parent.name for path in Path(kernels.__path__[0]).glob("*/shipped.py"))


def compile_operator(operator: str, architecture: str, *, full: bool) -> dict[str, Resources]:
    """Compile what an operator ships for an architecture; its kernels' resources by "kernel: call".

    full: every configuration, otherwise those that matter most. Kernels that compile to the same code are named once.
    """
    shipped = importlib.import_module(f"{kernels.__name__}.{operator}.shipped")
    used: dict[str, Resources] = {}
    seen: set[str] = set()
    for call, run in shipped.calls(full=full).items():
        with recording(architecture) as launches:
            run()
        for launch in launches:
            if key(launch) not in seen:
                seen.add(key(launch))
                name = launch.kernel.__name__.lstrip("_")
                variants = sum(other.startswith(f"{name}: {call}") for other in used)
                used[f"{name}: {call}" + (f" ({variants + 1})" if variants else "")] = compile_launch(
                    launch, architecture
                )
    return used


def key(launch: Launch) -> str:
    """The same for two launches that compile to the same code."""
    signature, constants, attributes = _specialised(launch)
    name = f"{launch.kernel.__module__}.{launch.kernel.__name__}"
    return f"{name} {signature} {constants} {attributes} {launch.num_warps} {launch.num_stages}"


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and divisibility of a kernel's parameters, as Triton's launcher would find them."""
    signature, constants, attributes = {}, {}, {}
    names = launch.kernel.arg_names
    special = {param.name for param in launch.kernel.params if not param.do_not_specialize}
    given = dict(zip([name for name in names if name not in launch.constants], launch.args, strict=True))
    for index, name in enumerate(names):
        if name in launch.constants:
            signature[name], constants[(index,)] = "constexpr", launch.constants[name]
            continue
        value = given[name]
        if value is None or (type(value) is int and value == 1 and name in special):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and name in special):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_DTYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    block = ",".join(map(str, value.block_shape))  # a TensorDescriptor
    return f"tensordesc<{_DTYPES[value.base.dtype]}[{block}]>"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, which is where spilled registers go."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return _number(r"REG:(\d+)", text.stdout), _number(r"STACK:(\d+)", text.stdout)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"found no {pattern!r} in the compiler's output")
    return int(found[1])


def table(rows: Mapping[str, Mapping[str, Resources]]) -> str:
    """Markdown: a line for each kernel and architecture, from name -> architecture -> resources."""
    lines = [
        "| kernel | architecture | registers | spilled bytes | shared KiB | matrix instructions |",
        "|---|---|---|---|---|---|",
    ]
    for name, by_architecture in rows.items():
        for architecture, used in by_architecture.items():
            lines.append(
                f"| {name} | {architecture} | {used.registers} | {used.spills} | {used.shared / 1024:.1f} "
                f"| {used.tensor_cores} |"
            )
    return "\n".join(lines)
