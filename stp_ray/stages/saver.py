"""Checkpoints written beside the training, which does not wait for the storage."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor

from ..artifacts import Checkpoints


class Saver:
    """Hands states to `Checkpoints`, one at a time and in order.

    At most one is on its way: the next waits for it. Leaving the block waits for the last one,
    however the block ends. What went wrong with a state is raised by the next call, or at the end.

    Args:
        checkpoints: where they go.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write the state of `step`, soon. It must not be changed any more.

        Raises:
            StorageError: the state before this one could not be written.
        """
        self._wait()
        self._pending = self._pool.submit(self._checkpoints.save, step, tensors, meta)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self._wait()
