"""The table of docs/reliability.md, from the lines that `chaos.py` has written."""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from filling import read
from markdown_table import put_between, row

MARKS = ("<!-- chaos -->", "<!-- end of chaos -->")

#: The names of `chaos.FAULTS`, and what they are.
WORDS = {
    "training worker": "SIGKILL of a training worker",
    "exploration actor": "SIGKILL of an exploration actor",
    "finalising task": "SIGKILL of a finalising task",
    "driver": "SIGKILL of the driver",
    "machine": "a worker's machine is lost, and is back after 5 s",
    "head": "all machines are lost, the head and the driver among them, and start again",
    "stopped": "SIGSTOP of a worker for 20 s",
    "storage away": "the object store is away for 10 s",
    "storage spoils": "one request in five answered 500, 503 or cut off, to the end of the run",
    "tracker away": "the driver is killed, and its tracker is away when it is started again",
    "disk full": "a worker's disk is full for 15 s",
}


def render(kept: Path, page: Path) -> None:
    """Write what was counted between the marks of the page."""
    if kept.exists():
        put_between(page, MARKS, table(read(kept)))


def table(lines: list[dict[str, Any]]) -> list[str]:
    """How many runs, what came of them, and how long each fault held them up."""
    ended = [line for line in lines if not line.get("failed")]
    hit = [line for line in ended if any(fault["came"] for fault in line["faults"])]
    counts = {
        "different weights or another front": sum(bool(line["different"]) for line in ended),
        "a candidate scored twice": sum(
            bool(line["scored_twice"] or line["rewritten_scores"]) for line in ended
        ),
        "an artifact that does not match its checksum": sum(
            bool(line["damaged"]) for line in ended
        ),
    }
    again, taken_s = [line["submissions"] for line in ended], [line["seconds"] for line in ended]
    found = [
        f"{len(lines)} runs, {len(ended)} complete, {len(hit)} of them after at least one fault "
        "(one may come too late). Of those that are complete, with "
        + "; with ".join(f"{what}: {count}" for what, count in counts.items())
        + f". The command was given {statistics.mean(again):.1f} times on average, "
        f"{max(again)} at most; a run took {statistics.median(taken_s):.0f} s "
        f"in the median ({lines[-1]['cores']} cores, {lines[-1]['device']}, machines as network "
        f"namespaces; revisions {', '.join(dict.fromkeys(line['revision'] for line in lines))}).",
        "",
        row(["fault", "stage", "times", "median s", "worst s"]),
        row(["---"] * 5),
    ]
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in ended:
        for fault in line["faults"]:
            if fault["came"]:
                seconds[fault["kind"], fault["stage"]].append(fault["recovery_s"])
    for kind, words in WORDS.items():
        for stage in ("supernet", "explore", "finalize"):
            if taken := seconds.get((kind, stage)):
                middle = f"{statistics.median(taken):.0f}"
                found.append(row([words, stage, len(taken), middle, f"{max(taken):.0f}"]))
    return [*found, ""]
