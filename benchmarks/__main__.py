"""Time, memory and accuracy of the losses, beside other libraries.

`run` measures and writes one JSON file, `compile` reads what the compiler of a GPU or
TPU makes of the losses, `report` renders such files. PyTorch and
TensorFlow take part where they are installed, each in a process of its own.
"""

import argparse
import os
import pathlib
import sys

from benchmarks import report
from benchmarks.cases import PRESETS

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# A CPU backend beside the GPU, and memory left for the other frameworks' processes.
_GPU_SETTINGS = {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="measure, and write a JSON file"))
    _add_compile(
        commands.add_parser("compile", help="for a GPU or a TPU, and read the result")
    )
    _add_trust(
        commands.add_parser("trust", help="what a long run may rely on; a JSON file")
    )
    _add_report(commands.add_parser("report", help="render JSON files"))
    arguments = parser.parse_args()
    arguments.command(arguments)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_run)
    parser.add_argument(
        "--preset", choices=PRESETS, default="cpu", help="default: %(default)s"
    )
    parser.add_argument(
        "--quick", dest="preset", action="store_const", const="quick", help="a try-out"
    )
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), help="default: the preset's"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="SUBSTRING",
        help="cases whose name has it, such as 'GPT-2' or 'bfloat16 random forward'",
    )
    parser.add_argument(
        "--peers",
        metavar="NAME,NAME",
        help="optax, jax.nn, torch, torch.compile, tensorflow; default: the preset's",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="of timed calls per case, all contestants together; each has at least 12",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="start no case that may end later; those not run are listed",
    )
    _add_shrink(parser)
    _add_out(parser)
    for name in ("torch", "tensorflow"):
        parser.add_argument(
            f"--{name}-python",
            default=sys.executable,
            metavar="PATH",
            help=f"the interpreter that has {name}; default: this one",
        )


def _run(arguments: argparse.Namespace) -> None:
    preset = PRESETS[arguments.preset]
    device = arguments.device or preset.device
    settings = {"JAX_PLATFORMS": "cpu"} if device == "cpu" else _GPU_SETTINGS
    for name, value in settings.items():
        os.environ.setdefault(name, value)

    from benchmarks import run  # imports JAX, which reads these settings
    from benchmarks.peers import PEERS

    peers = preset.peers
    if arguments.peers is not None:
        peers = tuple(filter(None, arguments.peers.split(",")))
    unknown = sorted(set(peers) - set(PEERS))
    if unknown:
        raise SystemExit(
            f"--peers: got {', '.join(unknown)}, expected some of {', '.join(PEERS)}."
        )
    path = run.run(
        arguments.preset,
        device=device,
        only=arguments.only,
        peers=peers,
        pythons={
            "torch": arguments.torch_python,
            "tensorflow": arguments.tensorflow_python,
        },
        budget=preset.budget if arguments.budget is None else arguments.budget,
        time_limit=(
            preset.time_limit if arguments.time_limit is None else arguments.time_limit
        ),
        shrink=arguments.shrink,
        out=arguments.out,
    )
    if path.exists():
        print(report.summary(path))
    print(path)


def _add_compile(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_compile)
    parser.add_argument(
        "--target",
        choices=("h100", "v5e", "v5e-4x2"),
        required=True,
        help="needs jax-cuda12-plugin and nvidia-cuda-nvcc-cu12, or libtpu; no device; "
        "of the last one, eight chips, only a split head",
    )
    _add_shrink(parser)
    _add_out(parser)


def _compile(arguments: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # where constants are made

    from benchmarks import compiled

    if arguments.target == "v5e-4x2":
        path = compiled.inspect_eight_chips(arguments.out, arguments.shrink)
    else:
        path = compiled.inspect(arguments.target, arguments.out, arguments.shrink)
    print(report.summary(path))
    print(path)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    from benchmarks.trust import ITEMS

    parser.set_defaults(command=_trust)
    parser.add_argument(
        "items",
        nargs="*",
        metavar="ITEM",
        help=f"{', '.join(ITEMS)}; default: all; a file keeps those not run again",
    )
    _add_out(parser)


def _trust(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from benchmarks import trust

    unknown = sorted(set(arguments.items) - set(trust.ITEMS))
    if unknown:
        raise SystemExit(
            f"ITEM: got {', '.join(unknown)}, expected some of "
            f"{', '.join(trust.ITEMS)}."
        )
    path = trust.inspect(arguments.items or trust.ITEMS, arguments.out)
    print(report.summary(path))
    print(path)


def _add_shrink(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shrink",
        type=int,
        default=1,
        metavar="N",
        help="divide every size by N, for a try-out on a smaller machine",
    )


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=os.environ.get("OUT", RESULTS),
        metavar="DIR",
        help="default: $OUT, or benchmarks/results",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_report)
    parser.add_argument(
        "files",
        nargs="*",
        type=pathlib.Path,
        metavar="JSON",
        help="default: all in benchmarks/results",
    )
    parser.add_argument(
        "--readme",
        type=pathlib.Path,
        default=ROOT / "README.md",
        metavar="PATH",
        help="where the short table goes, between two markers; default: README.md",
    )
    parser.add_argument(
        "--tables",
        type=pathlib.Path,
        default=RESULTS / "README.md",
        metavar="PATH",
        help="where all tables go; default: benchmarks/results/README.md",
    )


def _report(arguments: argparse.Namespace) -> None:
    files = arguments.files or sorted(RESULTS.glob("*.json"))
    report.report(files, arguments.readme, arguments.tables)


if __name__ == "__main__":
    main()
