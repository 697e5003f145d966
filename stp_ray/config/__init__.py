"""One frozen typed tree that says everything about a run.

A recipe (YAML) plus dotted overrides is validated once, on the driver; the resolved tree
is saved beside every artifact and each component gets only its own part. The options of
`method` and `data` are defined beside the code that they steer and embedded here.
"""

from .reading import load_config, to_yaml
from .tree import (
    ClusterOptions,
    ExportOptions,
    FinalizeOptions,
    ModelOptions,
    RunConfig,
    SpaceOptions,
    SupernetOptions,
    TrackingOptions,
    Training,
    dump_config,
    placed,
    run_id,
)

__all__ = [
    "ClusterOptions",
    "ExportOptions",
    "FinalizeOptions",
    "ModelOptions",
    "RunConfig",
    "SpaceOptions",
    "SupernetOptions",
    "TrackingOptions",
    "Training",
    "dump_config",
    "load_config",
    "placed",
    "run_id",
    "to_yaml",
]
