"""Where metrics go. A producer of metrics knows none of this, and no tracker stops a run."""

from .base import Artifact, MultiTracker, Tracker, file_name
from .run import Tracking
from .wandb_files import sync_command, wandb_folder, wandb_id

__all__ = [
    "Artifact", "MultiTracker", "Tracker", "Tracking", "file_name", "sync_command", "wandb_folder",
    "wandb_id",
]  # fmt: skip
