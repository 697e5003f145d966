"""A run's files on any fsspec storage: atomic, checksummed, never pickled.

`Store` is one folder; `Checkpoints` a row of resumable states in it; `Manifest` the record
of which stages are done. Weights are safetensors, tables Parquet, everything else JSON.
"""

from .checkpoints import Checkpoints
from .manifest import Manifest, Record
from .store import Store, jsonable, tensors_of

__all__ = ["Checkpoints", "Manifest", "Record", "Store", "jsonable", "tensors_of"]
