"""What training, search and pruned networks take, beside what the arithmetic alone would.

    python benchmarks/speed.py step --model resnet20 --subnets 1
    python benchmarks/speed.py ACTION --help
    python benchmarks/speed.py all

Each action is a module of `benchmarks/measure/`. All sides of a ratio are timed in turn in one
run. One line of JSON for each measurement goes into `benchmarks/results/speed/`, in place of what
the same command has said there before of the same device; `benchmarks/results.py render` makes
the tables of docs/performance.md. `all` measures what those tables show, but for steps of several
workers (`step` and `autonas`), those of ViT, those of four subnets on ResNet-50, and what is of
`scale.py`; each action in a process of its own. It wants two cores that nobody else uses, for 66
minutes at most. An action that looks at Ray needs
Ray, no other does.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from filling import read
from speed_tables import ACTIONS
from surroundings import cores_in_use, surroundings

KEPT = Path(__file__).resolve().parent / "results" / "speed"

#: What `all` measures, and the seconds after which it gives one up.
EVERYTHING = (
    ("step --repeats 2", 220),
    ("step --repeats 2 --model resnet50", 430),
    ("step --repeats 2 --model mobilenet_v2", 150),
    ("step --repeats 2 --subnets 4 --draws 8", 250),
    ("step --repeats 2 --subnets 4 --model mobilenet_v2 --draws 8", 170),
    # Skipped where nvidia-modelopt is missing.
    ("autonas --repeats 1 --draws 8 --threads 1 --processor-time", 200),
    ("memory --threads 1", 150),
    ("parallel --steps 3 --repeats 1", 200),
    ("exploring --threads 1", 150),
    (
        "exploring --model mobilenet_v2 --size 64 --calibration 256 --scoring 128 --candidates 6 "
        "--threads 1",
        150,
    ),
    ("tuning --threads 1 --population 32", 150),
    ("inference --threads 1 --repeats 6 1", 480),
    ("inference --threads 1 --repeats 6 --batches 1 --divisor 32", 200),
    ("latency --threads 1", 300),
    ("streaming --threads 1", 500),
    ("growth --threads 1", 200),
    ("paper", 60),
)


def keep(command: str, lines: list[dict[str, Any]], path: Path) -> None:
    """Put the lines of a command in place of what it said before of this device."""
    path.parent.mkdir(parents=True, exist_ok=True)
    device = lines[0]["device"]
    others = [
        line
        for line in read(path)
        # The oldest lines do not say what command they are of.
        if (line.get("command", command), line["device"]) != (command, device)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*others, *lines]))


def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure, and keep the lines."""
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    around, others = surroundings(device), cores_in_use()
    found = list(import_module(f"measure.{arguments.action}").measure(arguments, device))
    around["others"] = max(others, cores_in_use())
    lines = [{"command": command, **line, **around} for line in found]
    keep(command, lines, arguments.out / f"{arguments.action}.jsonl")
    print("\n".join(json.dumps(line, indent=2) for line in lines))


def everything() -> int:
    """Run every command; returns how many failed."""
    failed = 0
    for command, seconds in EVERYTHING:
        print(f"== {command}", flush=True)
        program = [sys.executable, __file__, *shlex.split(command)]
        try:
            failed += subprocess.run(program, timeout=seconds, check=False).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"no result after {seconds} s", flush=True)
            failed += 1
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ACTIONS:
        module = import_module(f"measure.{action}")
        each = actions.add_parser(action, help=(module.__doc__ or "").partition("\n")[0])
        module.options(each)
        each.add_argument("--threads", type=int, help="default: one for each core")
        each.add_argument("--out", type=Path, default=KEPT, help="folder of the lines")
    actions.add_parser("all", help="everything that the tables show")
    arguments = parser.parse_args()
    if arguments.action == "all":
        sys.exit(everything())
    # Where the lines go is no part of what they say.
    words = [word for word in sys.argv[1:] if word not in ("--out", str(arguments.out))]
    run(arguments, shlex.join(words))


if __name__ == "__main__":
    main()
