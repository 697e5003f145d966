"""Data-parallel workers on one machine: processes of one thread each in a group of gloo."""

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .setting import CASES

#: Seconds that a group of workers may take: a rank that hangs may not hang the measurement.
PATIENCE = 1200


def gathered(work: Callable[..., Any], workers: int, *arguments: Any) -> Any:
    """What `work(rank, workers, *arguments)` returns in rank 0 of so many workers."""
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        told = context.SimpleQueue()
        group = torch.multiprocessing.spawn(
            _member, (workers, work, arguments, CASES, folder, told), workers, join=False
        )
        deadline = time.monotonic() + PATIENCE
        while not group.join(timeout=1):
            if time.monotonic() > deadline:
                for process in group.processes:
                    process.kill()
                raise TimeoutError(f"{workers} workers took more than {PATIENCE} s")
        return told.get()


def _member(
    rank: int, workers: int, work: Callable[..., Any], arguments: tuple[Any, ...], cases: Any,
    folder: str, told: Any,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    CASES.update(cases)  # as the parent has them
    if workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{Path(folder) / 'rendezvous'}", rank=rank,
            world_size=workers, timeout=timedelta(seconds=PATIENCE / 2),
        )  # fmt: skip
    answer = work(rank, workers, *arguments)
    if rank == 0:
        told.put(answer)
    if workers > 1:
        dist.destroy_process_group()


def data_parallel(module: nn.Module, *, parts: bool = False) -> nn.Module:
    """The module as workers share it; itself where there is one.

    Args:
        module: what a step calls.
        parts: whether a backward pass may leave parameters out, which reductions have to know.
    """
    if not dist.is_initialized():
        return module
    return DistributedDataParallel(
        module, gradient_as_bucket_view=True, find_unused_parameters=parts
    )
