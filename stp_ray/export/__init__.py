"""A pruned model as files that outlive the run.

`save_model` writes what `load` reads back; `write_programs` writes the same network for other
runtimes, and `model_card` the page that goes with them.
"""

from .card import model_card
from .measure import latency
from .model import DESCRIPTION, FORMAT, load, save_model
from .programs import (
    FILES,
    FORMATS,
    ONNX,
    TOLERANCE,
    Program,
    onnx_program,
    onnx_session,
    to_executorch,
    to_onnx,
    to_openvino,
    to_pt2,
    write_programs,
)

__all__ = [
    "DESCRIPTION",
    "FILES",
    "FORMAT",
    "FORMATS",
    "ONNX",
    "TOLERANCE",
    "Program",
    "latency",
    "load",
    "model_card",
    "onnx_program",
    "onnx_session",
    "save_model",
    "to_executorch",
    "to_onnx",
    "to_openvino",
    "to_pt2",
    "write_programs",
]
