"""Programs for other runtimes, each checked against the network first. They are never read back
here: loading a `.pt2` can run code."""

import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..artifacts import Store
from ..errors import ExportError
from .measure import median_seconds, on_cpu, threads_used

Result = TypeVar("Result")

ONNX = "model.onnx"
PT2 = "model.pt2"
OPENVINO = "model.xml"
PTE = "model.pte"

#: Largest relative difference between an exported program and its module.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Program:
    """A network in another format, checked against the module that it was made from."""

    files: Mapping[str, bytes]
    """Name -> content; one file, except for OpenVINO's pair."""

    difference: float
    """Largest difference to the module's logits, relative to the largest of them."""

    latency_s: float
    """Median seconds of one image in the format's own runtime, on one thread of this CPU."""

    seconds: float
    """What writing and checking it took."""


def to_onnx(module: nn.Module, example: Tensor, tolerance: float = TOLERANCE) -> Program:
    """An ONNX program with a dynamic batch size, checked with ONNX Runtime on the CPU.

    Args:
        module: a classifier; exported in evaluation mode, left as it is.
        example: images [N, 3, H, W]; only the batch size stays free.
        tolerance: largest relative difference to the module's own output.

    Returns:
        The serialised program, input "images", output "logits".

    Raises:
        ExportError: a package of the `export` extra is missing, the model cannot be
            expressed, or the program computes something else.
    """
    began = time.perf_counter()
    data = onnx_program(module, example)
    with on_cpu(module, example) as (frozen, images):
        running = onnx_session(data)
        name = running.get_inputs()[0].name

        def forward(batch: Tensor) -> Tensor:
            return torch.from_numpy(running.run(None, {name: batch.numpy()})[0])

        return _checked("ONNX", {ONNX: data}, frozen, forward, images, tolerance, began)


def onnx_program(module: nn.Module, example: Tensor) -> bytes:
    """The program of `to_onnx`, not checked. Arguments and errors as there."""
    try:
        import onnxruntime  # noqa: F401  (nothing is written that cannot be run)
        import onnxscript  # noqa: F401  (needed by torch.onnx, which says so less clearly)
    except ImportError as error:
        raise _missing("onnx", "ONNX", "export", error) from error
    with on_cpu(module, example) as (frozen, images):
        program = _attempt(
            "ONNX",
            lambda: torch.onnx.export(
                frozen,
                (_batch(images, 2),),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                dynamo=True,
                verbose=False,
            ),
        )
    assert program is not None
    return _attempt("ONNX", lambda: program.model_proto.SerializeToString())


def onnx_session(data: bytes, threads: int = 1) -> Any:
    """ONNX Runtime's session of a program on so many CPU threads.

    Raises:
        ExportError: the runtime refuses the program.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return _attempt(
        "ONNX",
        lambda: onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]),
    )


def to_pt2(module: nn.Module, example: Tensor, tolerance: float = TOLERANCE) -> Program:
    """A `torch.export` program (`.pt2`) with a dynamic batch size, checked before writing.

    Args:
        module: a classifier; exported in evaluation mode, left as it is.
        example: images [N, 3, H, W]; only the batch size stays free.
        tolerance: largest relative difference to the module's own output.

    Raises:
        ExportError: the model cannot be expressed, or the program computes something else.
    """
    began = time.perf_counter()
    with on_cpu(module, example) as (frozen, images):
        program = _exported(".pt2", frozen, images)
        buffer = io.BytesIO()
        _attempt(".pt2", lambda: torch.export.save(program, buffer))
        files = {PT2: buffer.getvalue()}
        return _checked(".pt2", files, frozen, program.module(), images, tolerance, began)


def to_openvino(module: nn.Module, example: Tensor, tolerance: float = TOLERANCE) -> Program:
    """OpenVINO's pair of files, in float32, checked with its runtime on the CPU.

    Args:
        module: a classifier; exported in evaluation mode, left as it is.
        example: images [N, 3, H, W]; only the batch size stays free.
        tolerance: largest relative difference to the module's own output.

    Raises:
        ExportError: as for `to_onnx`; needs the `openvino` extra.
    """
    began = time.perf_counter()
    try:
        import openvino
    except ImportError as error:
        raise _missing("openvino", "OpenVINO", "openvino", error) from error
    with on_cpu(module, example) as (frozen, images):
        program = _exported("OpenVINO", frozen, images)
        model = _attempt("OpenVINO", lambda: openvino.convert_model(program))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / OPENVINO
            _attempt("OpenVINO", lambda: openvino.save_model(model, path, compress_to_fp16=False))
            files = {each.name: each.read_bytes() for each in sorted(path.parent.iterdir())}
        # Exact, and as fast as one thread can: the other programs are measured on one.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        running = _attempt("OpenVINO", lambda: openvino.compile_model(model, "CPU", settings))

        def forward(batch: Tensor) -> Tensor:
            return torch.from_numpy(running(batch.numpy())[0].copy())

        return _checked("OpenVINO", files, frozen, forward, images, tolerance, began)


def to_executorch(module: nn.Module, example: Tensor, tolerance: float = TOLERANCE) -> Program:
    """An ExecuTorch program (`.pte`) for phones and small devices, lowered to XNNPACK, checked
    with ExecuTorch's runtime on the CPU.

    It takes one image at a time: a device plans its memory for the largest batch [ours].

    Args:
        module: a classifier; exported in evaluation mode, left as it is.
        example: images [N, 3, H, W]; only H and W matter.
        tolerance: largest relative difference to the module's own output.

    Raises:
        ExportError: as for `to_onnx`; needs the `executorch` extra.
    """
    began = time.perf_counter()
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime
    except ImportError as error:
        raise _missing("executorch", "ExecuTorch", "executorch", error) from error
    with on_cpu(module, example) as (frozen, images):

        def lowered() -> bytes:
            program = torch.export.export(frozen, (_batch(images, 1),))
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            return edge.to_executorch().buffer

        data = _attempt("ExecuTorch", lowered)
        portable_lib._unsafe_reset_threadpool(1)  # the other programs are measured on one thread
        loaded = _attempt("ExecuTorch", lambda: Runtime.get().load_program(data))
        method = _attempt("ExecuTorch", lambda: loaded.load_method("forward"))

        def forward(batch: Tensor) -> Tensor:
            return method.execute([batch])[0].clone()

        one = (1,)
        return _checked("ExecuTorch", {PTE: data}, frozen, forward, images, tolerance, began, one)


#: What `stp export --to` and a recipe's `export` section offer.
FORMATS: Mapping[str, Callable[[nn.Module, Tensor], Program]] = {
    "onnx": to_onnx,
    "pt2": to_pt2,
    "openvino": to_openvino,
    "executorch": to_executorch,
}

#: The file that each format is known by.
FILES = {"onnx": ONNX, "pt2": PT2, "openvino": OPENVINO, "executorch": PTE}


def write_programs(
    store: Store, module: nn.Module, example: Tensor, formats: Sequence[str] = ("onnx", "pt2")
) -> tuple[dict[str, str], dict[str, dict[str, float]], list[str]]:
    """Write the network in other formats, as far as they can be had.

    Args:
        store: where to.
        module: the network.
        example: images [N, 3, H, W].
        formats: keys of `FORMATS`.

    Returns:
        The files that were written with their SHA-256; for each format `difference`,
        `latency_ms` and `seconds` as in `Program`; and one line for each format that could not
        be had: an export never fails a run.
    """
    written: dict[str, str] = {}
    figures: dict[str, dict[str, float]] = {}
    notes = []
    for kind in formats:
        try:
            program = FORMATS[kind](module, example)
        except ExportError as error:
            notes.append(str(error))
            continue
        written |= {name: store.write_bytes(name, data) for name, data in program.files.items()}
        figures[kind] = {
            "difference": program.difference,
            "latency_ms": 1e3 * program.latency_s,
            "seconds": program.seconds,
        }
    return written, figures, notes


def _missing(kind: str, name: str, extra: str, error: ImportError) -> ExportError:
    return ExportError(
        f"no {name} file: the package {error.name} is not installed; "
        f"install it with pip install 'stp_ray[{extra}]', or set export.{kind}=false"
    )


def _exported(kind: str, frozen: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    return _attempt(
        kind,
        lambda: torch.export.export(
            frozen, (_batch(images, 2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        ),
    )


def _checked(
    kind: str,
    files: Mapping[str, bytes],
    frozen: nn.Module,
    program: Callable[[Tensor], Tensor],
    images: Tensor,
    tolerance: float,
    began: float,
    sizes: Sequence[int] = (1, 3),
) -> Program:
    """The program with its figures; raises ExportError if it is not the same function."""
    difference = _compare(kind, frozen, program, images, tolerance, sizes)
    one = images[:1].contiguous()
    with threads_used(1):
        seconds = median_seconds(lambda: program(one), 30)
    return Program(files, difference, seconds, time.perf_counter() - began)


def _batch(images: Tensor, size: int) -> Tensor:
    """The images repeated or cut to a batch of this size."""
    times = -(-size // len(images))
    return images.repeat(times, *[1] * (images.dim() - 1))[:size].contiguous()


def _attempt(kind: str, action: Callable[[], Result]) -> Result:
    """Run a step of an exporter or a runtime; what it cannot do becomes one line. Their errors have
    no common base class, and an export may not end a run that trained for days."""
    try:
        with warnings.catch_warnings(), _quiet_exporters():
            warnings.simplefilter("ignore")
            return action()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ExportError(
            f"no {kind} file: this model cannot be expressed or run in it ({reason}); "
            f"set export.{kind.lower().lstrip('.')}=false to leave it out"
        ) from error


@contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Keep the exporters' progress notes, which are not the user's concern, off the log."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _compare(
    kind: str,
    module: nn.Module,
    program: Callable[[Tensor], Tensor],
    images: Tensor,
    tolerance: float,
    sizes: Sequence[int],
) -> float:
    """The largest relative difference at these batch sizes; raises ExportError if it is too
    large."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in sizes:
        batch = _batch(images, size)
        # Random images as well: an example of zeros would agree for the wrong reason.
        batch = batch + torch.randn(batch.shape, generator=generator).to(batch)
        expected = module(batch)
        found = _attempt(kind, partial(program, batch))
        if found.shape != expected.shape:
            raise ExportError(
                f"no {kind} file: the exported program answers {list(found.shape)} to a batch of "
                f"{size}; expected {list(expected.shape)} as the model does"
            )
        scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
        difference = ((found - expected).abs().max() / scale).item()
        if not difference <= tolerance:
            raise ExportError(
                f"no {kind} file: the exported program differs from the model by {difference:.2g} "
                f"(relative, batch of {size}); expected at most {tolerance:g}"
            )
        largest = max(largest, difference)
    return largest
