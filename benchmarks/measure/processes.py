"""Processor time and memory of this program and of all that it has started (Linux)."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

#: Seconds between two looks at the memory, each of which takes some hundredths of one.
EVERY = 0.5


def family() -> dict[int, float]:
    """Numbers of this process and its living descendants, with the processor time of each, that
    of its ended children included."""
    parents, seconds = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                number = int(entry.name)
                parents[number] = int(fields[1])
                seconds[number] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    found, waiting = {}, [os.getpid()]
    while waiting:
        number = waiting.pop()
        found[number] = seconds[number]
        waiting += [child for child, parent in parents.items() if parent == number]
    return found


def processor_seconds() -> float:
    """Of the whole family, since each of it was started."""
    return sum(family().values())


def memory_mb() -> float:
    """Of the whole family; what several share is counted once."""
    total = 0
    for number in family():
        with suppress(OSError):
            text = Path(f"/proc/{number}/smaps_rollup").read_text()
            total += next(int(x.split()[1]) for x in text.splitlines() if x.startswith("Pss:"))
    return total / 1024


@dataclass
class Peak:
    mb: float = 0.0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The largest memory of the family inside."""
    peak, over = Peak(memory_mb()), threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            peak.mb = max(peak.mb, memory_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
