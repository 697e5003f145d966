"""Checkpoints written beside the training, which does not wait for the storage."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

from torch import Tensor

from ..artifacts import Checkpoints

log = logging.getLogger(__name__)

#: Seconds that training waits for the state before: well below what other workers wait for it.
PATIENCE_S = 30.0


class Saver:
    """Hands states to `Checkpoints`, one at a time and in order.

    At most one is on its way: the next waits for it, and is passed over where that takes too long.
    Leaving the block waits for the last one, however the block ends. What went wrong with a state
    is raised by the next call, or at the end.

    Args:
        checkpoints: where they go.
        patience_s: seconds that a state waits for the one before.
    """

    def __init__(self, checkpoints: Checkpoints, patience_s: float = PATIENCE_S) -> None:
        self._checkpoints, self._patience_s = checkpoints, patience_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bool:
        """Write the state of `step`, soon. It must not be changed any more.

        Returns:
            Whether it will be written: not where the one before is still on its way.

        Raises:
            StorageError: the state before this one could not be written.
        """
        if self._pending is not None and wait([self._pending], self._patience_s).not_done:
            log.warning("no checkpoint of step %d: the one before is still on its way", step)
            return False
        self._wait()
        self._pending = self._pool.submit(self._checkpoints.save, step, tensors, meta)
        return True

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
