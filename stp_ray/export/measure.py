"""How long a network takes on this machine's CPU."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..elastic.attention import unfused_attention
from ..elastic.extract import deep_copy


def latency(module: nn.Module, example: Tensor, repeats: int = 30, threads: int = 1) -> float:
    """Median seconds of one forward pass on this machine's CPU, after warming up.

    Args:
        module: measured in evaluation mode on a copy, so that it is left as it is.
        example: images [N, 3, H, W]; the time is for the whole batch, so pass one image
            for the latency of one image.
        repeats: timed passes, after a third as many (at least three) that are not timed.
        threads: threads PyTorch may use, so that figures compare between machines with
            different numbers of cores.

    Raises:
        ValueError: `repeats` or `threads` is below 1.
    """
    if repeats < 1 or threads < 1:
        raise ValueError(f"latency: repeats={repeats}, threads={threads}; expected at least 1 each")
    with on_cpu(module, example) as (frozen, images), threads_used(threads), torch.inference_mode():
        return median_seconds(lambda: frozen(images), repeats)


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """The median of so many calls, after a third as many (at least three) that are not timed."""
    for _ in range(max(3, repeats // 3)):
        action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextmanager
def threads_used(count: int) -> Iterator[None]:
    """PyTorch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def on_cpu(module: nn.Module, example: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """A copy of the module on the CPU in evaluation mode, and the example beside it.

    Fused attention is off: no exporter can express it, and it would hide what a runtime
    really does.
    """
    frozen = deep_copy(module).cpu().eval()
    with unfused_attention(), torch.no_grad():
        yield frozen, example.detach().cpu()
