"""The measuring process of `longtrain bench kernels`: all parts, one after the other, on one device."""

import argparse
import gc
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from longtrain.bench_kernels import parts_cpu, parts_gpu, resources, roofline
from longtrain.bench_kernels.bench import Bench
from longtrain.bench_kernels.report import Report
from longtrain.bench_kernels.sides import Disagreement
from longtrain.kernels.launching import ARCHITECTURES


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 where results were wrong, otherwise 0: a bar that is missed is a result too."""
    parser = argparse.ArgumentParser(prog="python -m longtrain.bench_kernels", description="The kernels' measurements.")
    parser.add_argument("--device", required=True, help="cpu or cuda")
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--shrink", type=int, default=1, help="divides the lengths: for tests")
    parser.add_argument("--only", type=lambda names: names.split(","))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--resources", action="store_true")
    parser.add_argument("--roofline", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.roofline:
        return _show(roofline.document() + "\n", arguments.write, "kernels_roofline.md")
    if arguments.resources:
        return _show(compile_all(), arguments.write, "kernel_resources.md")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    return measure(device, arguments.only, arguments.repeats, write=arguments.write, shrink=arguments.shrink)


def measure(
    device: torch.device, only: Sequence[str] | None, repeats: int, *, write: Path | None = None, shrink: int = 1
) -> int:
    """Run the parts that are asked for, by default all."""
    parts = parts_cpu.PARTS if device.type == "cpu" else parts_gpu.PARTS
    command = "longtrain bench kernels" + (f" --only {','.join(only)}" if only else "") + f" --repeats {repeats}"
    report = Report(device, command, repeats)
    print("\n".join(f"{name}: {value}" for name, value in report.settings().items()), flush=True)
    failed = False
    for name in parts:
        if only is None or name in only:
            try:
                parts[name](Bench(report, repeats, shrink))
            except Disagreement as wrong:
                failed = True
                report.notes.append(f"{wrong}: no comparison")
                print(f"longtrain: {wrong}: no comparison", file=sys.stderr, flush=True)
            except Exception as error:  # the parts after it are worth having
                failed = True
                report.notes.append(f"{name} ended with {type(error).__name__}: {error}")
                traceback.print_exc()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if write is not None and report.rows:
        report.write(write)
    return int(failed)


def compile_all(
    operators: Sequence[str] | None = None, architectures: Sequence[str] = ARCHITECTURES, *, full: bool = True
) -> str:
    """What operators ship (by default all of them), compiled in two processes: markdown."""
    rows: dict[str, dict[str, resources.Resources]] = {}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = {
            (operator, architecture): pool.submit(resources.compile_operator, operator, architecture, full=full)
            for operator in operators or resources.operators()
            for architecture in architectures
        }
        for (operator, architecture), job in jobs.items():
            for name, used in job.result().items():
                rows.setdefault(f"{operator} {name}", {})[architecture] = used
            print(f"{operator}: compiled for {architecture}", file=sys.stderr, flush=True)
    introduction = (
        "# What the compiler makes of the kernels\n\nWritten by `longtrain bench kernels --resources`, which needs no "
        "GPU: every kernel that ships, with every configuration, compiled for each architecture. Registers are those "
        "of a thread; of shared memory one program may have "
        + ", ".join(f"{limit // 1024} KiB ({name})" for name, limit in resources.SHARED_LIMITS.items())
        + "."
    )
    return f"{introduction}\n\n{resources.table(rows)}\n"


def _show(text: str, folder: Path | None, name: str) -> int:
    print(text, end="", flush=True)
    if folder is not None:
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
