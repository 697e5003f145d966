"""The trackers of a run."""

import logging
import sys
from collections.abc import Sequence
from typing import Protocol

from ..artifacts import Store
from .base import MultiTracker, Tracker
from .console import ConsoleTracker
from .jsonl import JsonlTracker
from .wandb_files import WandbTracker, wandb_folder
from .wandb_upload import Uploads

log = logging.getLogger(__name__)


class TrackingChoice(Protocol):
    """The part of a run's configuration that is read here."""

    @property
    def console(self) -> bool: ...

    @property
    def wandb(self) -> str: ...

    @property
    def project(self) -> str: ...


class Tracking:
    """Makes the trackers of a run's stages, and keeps what they share.

    Args:
        options: the run's `tracking` section.
        run_id: groups a run's stages in wandb.
        store: the run's folder.
    """

    def __init__(self, options: TrackingChoice, run_id: str, store: Store) -> None:
        self._options, self._run_id, self._store = options, run_id, store
        self._folder = wandb_folder(store, run_id) if options.wandb != "off" else None
        self._uploads: Uploads | None = None
        if options.wandb == "online" and self._folder is not None:
            self._uploads = Uploads(options.project, run_id, self._folder)
        self._budgets: list[str] = []

    def of(self, stage: str) -> Tracker:
        """All trackers of one stage as one: JSON lines always, console and wandb as asked for."""
        trackers: list[Tracker] = [JsonlTracker(self._store)]
        if self._options.console:
            trackers.append(ConsoleTracker())
        if self._folder is not None:
            project = self._options.project
            trackers.append(WandbTracker(project, self._run_id, self._folder, self._uploads))
        return MultiTracker(trackers)

    def complete(self, budgets: Sequence[str]) -> None:
        """The run went to its end with these budgets."""
        self._budgets = list(budgets)

    def close(self) -> None:
        """Nothing more will be tracked; waits a few seconds at most for what is under way."""
        if self._uploads is None:
            return
        page = None
        try:
            page = self._uploads.finish(self._budgets)
        except Exception as error:  # as of any tracker
            log.warning("wandb: %s: %s; the run goes on", type(error).__name__, error)
        if page is not None and self._options.console:
            print(f"wandb report: {page}", file=sys.stderr)
