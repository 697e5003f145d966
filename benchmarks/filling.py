"""Fills a file of results: one line for each network, one after the other or side by side."""

import json
import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

Line = dict[str, Any]

#: Which network: method, budget, and what is equal; its line says that too.
Cell = dict[str, Any]

#: (seed, cell, the lines of that seed) -> the line of the cell, or None for none.
Train = Callable[[int, Cell, list[Line]], Line | None]


class Table:
    """A file of results, and which of the wanted ones it still lacks.

    Args:
        path: one line of JSON for each network.
        wanted: (seed, cell), in the order in which they are trained.
        needs: the methods whose line of the same seed and budget a cell reads.
    """

    def __init__(
        self, path: Path, wanted: list[tuple[int, Cell]], needs: Callable[[Cell], list[str]]
    ) -> None:
        self._path, self._needs = path, needs
        lines = read(path)
        self.wanted = [
            (seed, cell) for seed, cell in wanted if not is_there({**cell, "seed": seed}, lines)
        ]

    def of(self, seed: int) -> list[Line]:
        """The lines of a seed."""
        return [line for line in read(self._path) if line["seed"] == seed]

    def lacks(self, seed: int, cell: Cell) -> list[str]:
        """The methods that have to be there before the cell can be trained."""
        there = {line["method"] for line in self.of(seed) if line["budget"] == cell["budget"]}
        return [method for method in self._needs(cell) if method not in there]

    def add(self, line: Line | None) -> None:
        if line is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"seed {line['seed']}  {line['method']:30} {line['budget']:<5} "
            f"equal {line['equal']:6} top-1 {line['top1']:6.2f}  {line['epochs']:4} epochs  "
            f"{line['training_macs'] / 1e9:9.1f} GMACs  {line['seconds']:7.1f} s",
            flush=True,
        )


def fill(table: Table, make: Callable[[], Train], jobs: int) -> None:
    """Train what the table lacks, in so many processes, each with a `Train` of its own."""
    if jobs > 1:
        return _side_by_side(table, make, jobs)
    train = make()
    for seed, cell in table.wanted:
        if lacking := table.lacks(seed, cell):
            raise SystemExit(
                f"seed {seed}: {cell['method']} at {cell['budget']} needs the line of "
                f"{lacking[0]}; add it first"
            )
        table.add(train(seed, cell, table.of(seed)))


def _side_by_side(table: Table, make: Callable[[], Train], jobs: int) -> None:
    """A cell that fails keeps none of the others back."""
    waiting, failed = list(table.wanted), 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, _prepare, (make,)) as pool:
        running: set[Future[Line | None]] = set()
        while True:
            ready = [unit for unit in waiting if not table.lacks(*unit)]
            for seed, cell in ready[: jobs - len(running)]:
                running.add(pool.submit(_train, seed, cell, table.of(seed)))
                waiting.remove((seed, cell))
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                try:
                    table.add(future.result())
                except Exception:
                    failed += 1
                    traceback.print_exc()
    if failed or waiting:
        raise SystemExit(f"{failed} failed, and {len(waiting)} need lines that are not there")


def _prepare(make: Callable[[], Train]) -> None:
    """Make what this process trains with."""
    global _made
    _made = make()


def _train(seed: int, cell: Cell, done: list[Line]) -> Line | None:
    return _made(seed, cell, done)


def read(path: Path) -> list[Line]:
    """The lines of a file of results, if there is one."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_there(cell: Cell, lines: list[Line]) -> bool:
    """Whether one of the lines is that of the cell."""
    return any(all(line[key] == cell[key] for key in cell) for line in lines)
