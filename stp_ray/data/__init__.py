"""Images: where they come from, and the batches that they become."""

from .batches import eval_batches, local_batch_size, steps_per_epoch, train_batches
from .convert import dataset_to_parquet, folder_to_parquet
from .load import DataSummary, SplitName, describe, load, load_split
from .options import DataOptions
from .split import ImageData, Split

__all__ = [
    "DataOptions",
    "DataSummary",
    "ImageData",
    "Split",
    "SplitName",
    "dataset_to_parquet",
    "describe",
    "eval_batches",
    "folder_to_parquet",
    "load",
    "load_split",
    "local_batch_size",
    "steps_per_epoch",
    "train_batches",
]
