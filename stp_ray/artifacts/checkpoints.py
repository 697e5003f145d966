"""Resumable states of a training."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import StorageError
from .store import Store, first_line, tensors_of

log = logging.getLogger(__name__)


class _Damaged(StorageError):
    """A state that will never be whole, however often it is read."""


class Checkpoints:
    """Resumable states `checkpoint-<step>/{state.safetensors, meta.json, complete.json}`.

    `complete.json` holds the checksums and is written last, so that a state which was being
    written when the process died is recognised and passed over. Written by one process.

    Args:
        store: the folder that they lie in.
        keep: how many of the newest complete ones stay.
    """

    PREFIX = "checkpoint-"
    _MARKER = "complete.json"

    def __init__(self, store: Store, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected at least 1")
        self.store = store
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write the state of `step` (optimiser steps done), then delete the oldest ones.

        Args:
            step: at least 0; a state of the same step is replaced.
            tensors: named tensors of any device.
            meta: JSON-able content.
        """
        name = f"{self.PREFIX}{step:08d}"
        folder = self.store.child(name)
        folder.delete(self._MARKER)
        checksums = {
            "state.safetensors": folder.save_tensors("state.safetensors", tensors),
            "meta.json": folder.write_json("meta.json", meta),
        }
        folder.write_json(self._MARKER, {"step": step, "sha256": checksums})
        self._prune(name)

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest state that is complete and undamaged: (step, tensors, meta).

        One that is incomplete or fails its checksums is passed over with a warning.

        Raises:
            StorageError: storage does not answer: what it would have said is not known.
        """
        for name in reversed(self._folders()):
            try:
                return self._load(name)
            except _Damaged as error:
                log.warning("passing over %s: %s", name, error)
        return None

    def newest_meta(self) -> dict[str, Any]:
        """The meta of the newest state that is complete, without reading its tensors, which may
        turn out to be damaged; {} where there is none."""
        for name in reversed(self._folders()):
            folder = self.store.child(name)
            with contextlib.suppress(StorageError):
                if folder.exists(self._MARKER):
                    meta: dict[str, Any] = folder.read_json("meta.json")
                    return meta
        return {}

    def _load(self, name: str) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        folder = self.store.child(name)
        if not folder.exists(self._MARKER):
            raise _Damaged("it was not finished")
        content = {}
        for file in (self._MARKER, "state.safetensors", "meta.json"):
            try:
                content[file] = folder.read_bytes(file)
            except StorageError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise _Damaged(f"{file} is missing") from error
                raise
        try:
            marker = json.loads(content.pop(self._MARKER))
            step, sums = int(marker["step"]), dict(marker["sha256"])
        except (ValueError, TypeError, KeyError):
            raise _Damaged(f"{self._MARKER} is damaged") from None
        for file, data in content.items():
            if hashlib.sha256(data).hexdigest() != sums.get(file):
                raise _Damaged(f"{file} does not match its checksum")
        try:  # what its checksum fits may still be of another format
            tensors = tensors_of(content["state.safetensors"], f"{folder.uri}/state.safetensors")
            return step, tensors, dict(json.loads(content["meta.json"]))
        except (StorageError, ValueError, TypeError) as error:
            raise _Damaged(first_line(error)) from error

    def _folders(self) -> list[str]:
        names = self.store.names(self.PREFIX)
        return sorted(
            (n for n in names if n.removeprefix(self.PREFIX).isdecimal()),
            key=lambda n: int(n.removeprefix(self.PREFIX)),
        )

    def _prune(self, newest: str) -> None:
        """Delete what is older than the `keep` newest complete ones, unfinished ones included."""
        older = self._folders()
        older = older[: older.index(newest)] if newest in older else []
        kept = 1
        for name in reversed(older):
            folder = self.store.child(name)
            if kept < self.keep and folder.exists(self._MARKER):
                kept += 1
                continue
            folder.delete(self._MARKER)  # first, so that a half-deleted one is not taken for whole
            self.store.delete(name)
