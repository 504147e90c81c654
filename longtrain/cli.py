"""The command `longtrain`.

Torch is imported only by the commands that need it, so `longtrain --help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from longtrain import __version__
from longtrain.errors import UsageError, text_of

EXAMPLES = """\
examples:
  longtrain train quickstart                      train a recipe, on all GPUs or on the CPU
  longtrain train quickstart trainer.steps=100    change any key of the recipe
  longtrain train quickstart data=text data.path=notes/ data.length=8192
  longtrain train quickstart resume=runs/quickstart-20260131-120000
  longtrain eval runs/quickstart-20260131-120000  held-out loss of the newest checkpoint
  longtrain generate runs/quickstart-20260131-120000 --prompt "def "
  longtrain plan llama_8b_1m --devices 8xh200     memory and time of a recipe before it is launched
  longtrain bench training quickstart             speed beside a bare PyTorch loop
  longtrain bench training quickstart --devices 1,2    scaling over devices
  longtrain bench attention                       attention over processes beside one process
  longtrain bench mixers                          linear operators and mixers as sequences grow
  longtrain bench kernels                         one device's kernels beside the best others
  longtrain bench recall                          how much fixed-decay, hybrid and softmax models remember

longtrain/recipes/base.yaml lists every key with its unit and reason. Across machines, start the same entry with
torchrun: torchrun --nproc_per_node 8 -m longtrain.train --config-name quickstart key=value
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for what the user can mend, 1 for other failures."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes no second group of key=value, after an option
        if not hasattr(arguments, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides = [*arguments.overrides, *rest]
    try:
        return arguments.command(arguments)
    except UsageError as error:
        sys.stderr.write(text_of(error, environment=os.environ))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output, head say, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush would complain
        return 141


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longtrain",
        description="Train models on sequences longer than one device can hold.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the examples' lines
    )
    parser.add_argument("--version", action="version", version=f"longtrain {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train a recipe", description=_train.__doc__)
    _add_recipe(train)
    train.add_argument("--print", action="store_true", dest="show", help="show what would run, and start nothing")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("eval", help="held-out loss of a run", description=_evaluate.__doc__)
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument("--sequences", type=int, metavar="N", help="held-out sequences; default: the recipe's")
    evaluate.set_defaults(command=_evaluate)

    generate = commands.add_parser("generate", help="text from a run", description=_generate.__doc__)
    generate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    generate.add_argument("--prompt", metavar="TEXT", help="text to continue; default: the start of a document")
    generate.add_argument("--tokens", type=int, metavar="N", help="at most so many new tokens")
    generate.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token")
    generate.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    generate.set_defaults(command=_generate)

    plan = commands.add_parser("plan", help="memory and time before a launch", description=_plan.__doc__)
    _add_recipe(plan)
    plan.add_argument(
        "--devices", required=True, metavar="NxNAME", help="8xh200, say; a100, h100, h200, b200, mi300x, cpu"
    )
    plan.add_argument("--longest", action="store_true", help="instead: the longest data.length that fits")
    plan.add_argument(
        "--search", action="store_true", help="instead: the fastest degrees, layout and recompute that fit"
    )
    plan.add_argument("--dry-run", action="store_true", help="also run one step without devices, and count its memory")
    plan.set_defaults(command=_plan)

    bench = commands.add_parser("bench", help="measure", description="Benchmarks on this machine.")
    kinds = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    training = kinds.add_parser("training", help="a recipe's speed", description=_bench_training.__doc__)
    _add_recipe(training)
    training.add_argument("--repeats", type=int, default=3, metavar="N", help="measurements of each side (default 3)")
    training.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps of each (default 10)")
    training.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before those (default 3)")
    training.add_argument("--devices", metavar="NUMBERS", help="instead: scaling over 1,2,4,... devices")
    training.add_argument(
        "--longest", type=float, metavar="GIB", help="of --devices: measure the longest T in so much memory a device"
    )
    training.add_argument("--output", type=Path, metavar="DIR", help="of --devices: write table, plot and JSON there")
    training.set_defaults(command=_bench_training)

    attention = kinds.add_parser("attention", help="attention's speed and memory", description=_bench_attention.__doc__)
    for name, what in (
        ("length", "tokens T of the sequence (16384; 65536 on GPUs)"),
        ("heads", "query heads H (8; 32 on GPUs)"),
        ("kv-heads", "key/value heads G (as many as query heads; 8 on GPUs)"),
        ("width", "width K of a head (64; 128 on GPUs)"),
        ("processes", "ranks that share the sequence (2; one per GPU)"),
        ("virtual", "play so many ranks in turn on one device: the layouts' critical paths"),
    ):
        attention.add_argument(f"--{name}", type=int, metavar="N", help=what)
    attention.add_argument("--repeats", type=int, default=3, metavar="N", help="measurements of each side (default 3)")
    attention.add_argument("--dtype", help="float32; bfloat16 on GPUs")
    attention.add_argument("--device", help="cpu or gpu; default: GPUs where there are any")
    attention.add_argument("--only", metavar="PARTS", help="out of scaling,packed,rival,memory,virtual")
    attention.add_argument("--strategy", metavar="NAMES", help="out of ring,allgather,ulysses,mesh,auto (ring)")
    attention.add_argument("--output", type=Path, metavar="FILE", help="write the results there too, as markdown")
    attention.set_defaults(command=_bench_attention)
    _add_bench_mixers(kinds)
    _add_bench_kernels(kinds)
    _add_bench_recall(kinds)
    return parser


def _add_bench_mixers(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    mixers = kinds.add_parser("mixers", help="mixers as sequences grow", description=_bench_mixers.__doc__)
    mixers.add_argument("--only", metavar="PARTS", help="out of operators,mixers,scaling (operators,mixers)")
    mixers.add_argument("--operators", metavar="NAMES", help="which operators (all); a wrong name lists them")
    mixers.add_argument("--mixers", metavar="NAMES", help="which mixers (all); scaling measures those named here too")
    mixers.add_argument("--ranks", metavar="NUMBERS", help="ranks that share a sequence (1,2,4 up to all there are)")
    for name, default, what in (
        ("shortest", 2048, "first sequence length T, then doubled again and again (2048)"),
        ("longest", None, "last T; default: until time or memory end it"),
        ("softmax-longest", None, "last T of softmax, whose time grows with T * T (16384; 65536 on GPUs)"),
        ("length", 65536, "T of the part scaling (65536)"),
        ("heads", None, "heads H (4; 16 on GPUs)"),
        ("width", None, "width K of a head (64; 128 on GPUs)"),
        ("repeats", 3, "measurements of each side (3)"),
    ):
        mixers.add_argument(f"--{name}", type=int, default=default, metavar="N", help=what)
    mixers.add_argument("--seconds", type=float, default=4.0, metavar="S", help="limit for each line of a table (4)")
    mixers.add_argument("--memory", type=float, metavar="GIB", help="limit: CPU, all ranks together; GPUs, each")
    mixers.add_argument("--dtype", help="float32; bfloat16 on GPUs")
    mixers.add_argument("--device", help="cpu or gpu; default: GPUs where there are any")
    mixers.add_argument("--layout", default="natural", help="contiguous, zigzag or natural: what is best for each")
    mixers.add_argument("--strategy", default="auto", help="of linear operators: allgather, alltoall, chain, ulysses")
    mixers.add_argument("--output", type=Path, metavar="FILE", help="write markdown there, and the plot beside it")
    mixers.set_defaults(command=_bench_mixers)


def _add_bench_kernels(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    kernels = kinds.add_parser("kernels", help="one device's kernels", description=_bench_kernels.__doc__)
    kernels.add_argument("--device", help="cpu or gpu; default: a GPU where there is one")
    kernels.add_argument("--repeats", type=int, default=5, metavar="N", help="samples of each side (default 5)")
    kernels.add_argument("--only", metavar="PARTS", help="out of linear,delta,conv,cross-entropy, on a GPU more")
    kernels.add_argument("--write", type=Path, metavar="DIR", help="write markdown and JSON there, by the hardware")
    kernels.add_argument("--resources", action="store_true", help="instead: compile all, registers and shared memory")
    kernels.add_argument("--roofline", action="store_true", help="instead: the least time that hardware allows")
    kernels.set_defaults(command=_bench_kernels)


def _add_bench_recall(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    recall = kinds.add_parser("recall", help="what mixers remember", description=_bench_recall.__doc__)
    recall.add_argument("overrides", nargs="*", metavar="key=value", help="keys of all three recipes to change")
    recall.add_argument("--output", type=Path, metavar="DIR", help="new folder; default: runs/recall-<time>")
    recall.set_defaults(command=_bench_recall)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change")


def _train(arguments: argparse.Namespace) -> int:
    """Check a recipe, start one process per GPU (on CPU: launch.processes) by launch.launcher, and train."""
    from longtrain.config import compose
    from longtrain.launch import starting

    recipe = compose(arguments.recipe, arguments.overrides)
    return starting.start(recipe, arguments.recipe, arguments.overrides, show=arguments.show)


def _evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate a run's newest checkpoint on held-out text, on as many processes as the run would get here."""
    from longtrain.config import read_run
    from longtrain.launch.local import processes_for, run_ranks

    command = [sys.executable, "-m", "longtrain.evaluation", str(arguments.run)]
    if arguments.sequences is not None:
        command += ["--sequences", str(arguments.sequences)]
    processes = processes_for(read_run(arguments.run))
    return run_ranks(command, processes=processes, logs=arguments.run / "logs")


def _generate(arguments: argparse.Namespace) -> int:
    """Print a prompt and what a run's newest checkpoint continues it with."""
    from longtrain import generation

    command = [str(arguments.run)]
    for name in ("prompt", "tokens", "temperature", "seed"):
        value = getattr(arguments, name)
        if value is not None:
            command.append(f"--{name}={value}")  # one word, so that a prompt may start with a dash
    return generation.main(command)


def _plan(arguments: argparse.Namespace) -> int:
    """Say what a recipe would hold on each of some devices, how long a step should take, and what to change."""
    from longtrain.launch import plan

    return plan.run(
        arguments.recipe,
        arguments.overrides,
        devices=arguments.devices,
        want_longest=arguments.longest,
        want_search=arguments.search,
        dry=arguments.dry_run,
    )


def _bench_training(arguments: argparse.Namespace) -> int:
    """Measure a recipe's training speed beside a bare PyTorch loop of the same model and batch, or over devices."""
    from longtrain.launch import benchmark_scaling, benchmark_training

    if arguments.devices is not None:
        given = {name: value for name, value in vars(arguments).items() if name != "command"}
        return benchmark_scaling.run(benchmark_scaling.options(**given))
    for option in ("longest", "output"):
        if (given := getattr(arguments, option)) is not None:
            raise UsageError(f"--{option}: got {given} without --devices, which it is for")
    return benchmark_training.run(
        arguments.recipe,
        arguments.overrides,
        repeats=arguments.repeats,
        steps=arguments.steps,
        warm_up=arguments.warm_up,
    )


def _bench_attention(arguments: argparse.Namespace) -> int:
    """Measure attention over several processes beside one process's SDPA, and the memory that a rank needs."""
    from longtrain.launch import benchmark_attention
    from longtrain.launch.attention_options import options

    given = {name: value for name, value in vars(arguments).items() if name != "command"}
    return benchmark_attention.run(options(**given))


def _bench_mixers(arguments: argparse.Namespace) -> int:
    """Measure operators and mixers over ranks as sequences grow, beside softmax: speed, memory, bytes received."""
    from longtrain.launch import benchmark_mixers
    from longtrain.launch.mixers_options import options

    given = {name: value for name, value in vars(arguments).items() if name != "command"}
    return benchmark_mixers.run(options(**given))


def _bench_recall(arguments: argparse.Namespace) -> int:
    """Train recall_linear, recall_hybrid and recall_softmax in turn, and draw their accuracy by number of pairs."""
    from longtrain.launch import benchmark_recall

    return benchmark_recall.run(arguments.overrides, output=arguments.output)


def _bench_kernels(arguments: argparse.Namespace) -> int:
    """Measure the kernels on one device, each beside the best rival at hand and the least time that hardware allows."""
    from longtrain.launch import benchmark_kernels

    given = {name: value for name, value in vars(arguments).items() if name != "command"}
    return benchmark_kernels.run(benchmark_kernels.options(**given))
