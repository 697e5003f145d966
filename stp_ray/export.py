"""A pruned model as files that outlive the run.

`save_model` writes what `load` reads back: weights as safetensors beside a JSON
description that names how to rebuild the architecture. ONNX and `.pt2` programs are
written for other runtimes, each checked against the module first, and are never read
back here: loading a `.pt2` can run code.
"""

import copy
import io
import json
import logging
import statistics
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
import yaml
from torch import Tensor, nn

from . import models
from .artifacts import Store
from .elastic.attention import unfused_attention
from .elastic.subnet import Subnet
from .elastic.supernet import Supernet
from .errors import ConfigError, StorageError, StpError

Result = TypeVar("Result")

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
ONNX = "model.onnx"
PT2 = "model.pt2"
OPENVINO = "model.xml"
PTE = "model.pte"

#: What model.json says it is; a reader refuses a format that it does not know.
FORMAT = "stp_ray.model/1"

#: Largest relative difference between an exported program and its module.
TOLERANCE = 1e-4

_REQUIRED = {"model": dict, "num_classes": int, "image_size": int, "space": dict, "subnet": dict}

# What PyTorch's exporters raise for a model that they cannot express: there is no common
# base class, and an export may not end a run that trained for days.
_EXPORTER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class ExportError(StpError):
    """A program that could not be written, or that computes something else."""


def save_model(store: Store, module: nn.Module, description: Mapping[str, Any]) -> dict[str, str]:
    """Write `model.safetensors` and then `model.json`: a model that can be loaded again.

    Args:
        store: where to; the description is written last, so that its presence means that
            the weights are complete.
        module: an extracted model; its state dict is written in float32 or whatever type
            it has, without sharing between tensors.
        description: what `load` needs to rebuild the architecture, JSON only:
            `model`: {"name", "kwargs"} of the dense model, `num_classes`, `image_size` in
            pixels, `space`: {"divisor", "min_ratio"}, and `subnet`: the JSON of
            the subnet, as text or as its parsed form. More keys may follow.

    Returns:
        The names of the files and their SHA-256.

    Raises:
        ExportError: a key is missing or a value is not JSON.
    """
    missing = [key for key in _REQUIRED if key not in description]
    if not missing and "name" not in description["model"]:
        missing = ["model.name"]
    if missing:
        raise ExportError(
            f"a model description lacks {', '.join(missing)}; expected the keys "
            f"{', '.join(_REQUIRED)}, with model = {{name, kwargs}}"
        )
    subnet = description["subnet"]
    if isinstance(subnet, str):
        subnet = json.loads(subnet)
    content = {
        **description,
        "format": FORMAT,
        "model": {"kwargs": {}, **description["model"]},
        "subnet": json.loads(Subnet.from_json(json.dumps(subnet)).to_json()),
    }
    try:
        content = json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ExportError(f"a model description is not JSON: {error}") from error
    tensors = {
        # Cloned, because safetensors refuses tensors that share memory.
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }
    weights = store.save_tensors(WEIGHTS, tensors)
    return {WEIGHTS: weights, DESCRIPTION: store.write_json(DESCRIPTION, content)}


def load(uri: str, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """A pruned model back from the folder that `save_model` wrote, in evaluation mode.

    The dense architecture is built again, sliced to the subnet, and given the weights.
    Nothing is unpickled and no import path read from storage is followed.

    Args:
        uri: the folder of model.safetensors and model.json, on any storage.
        factory: builds the dense model where it is your own; called with the keyword
            arguments of the run's `model.kwargs`, and num_classes and image_size where it
            takes them.

    Raises:
        StorageError: a file is missing, damaged, or of another format.
        ConfigError: the model is your own and no factory was passed.
    """
    store = Store(uri)
    content = store.read_json(DESCRIPTION)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise StorageError(
            f"{store.uri}/{DESCRIPTION} has the format {found!r}; expected {FORMAT!r}; "
            "load it with the version of stp_ray that wrote it"
        )
    if missing := [key for key in _REQUIRED if key not in content]:
        raise StorageError(
            f"{store.uri}/{DESCRIPTION} lacks {', '.join(missing)}; expected the file as it was "
            "written; copy it again"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(content[key], kind):
            raise StorageError(
                f"{store.uri}/{DESCRIPTION} says {key}: {content[key]!r:.80}; expected the file as "
                "it was written; copy it again"
            )
    dense = _dense(content, factory)
    size = content["image_size"]
    try:
        net = Supernet.trace(dense, torch.zeros(1, 3, size, size), **content["space"])
        subnet = Subnet.from_json(json.dumps(content["subnet"]))
    except (TypeError, ValueError) as error:
        raise StorageError(
            f"{store.uri}/{DESCRIPTION} describes no network: {error}; expected the file as it was "
            "written; copy it again"
        ) from error
    try:
        net.space.validate(subnet)
        module = net.extract(subnet)
        module.load_state_dict(store.load_tensors(WEIGHTS))
    except (RuntimeError, ValueError) as error:
        raise StorageError(
            f"{store.uri} does not fit the model {content['model']['name']!r}: "
            f"{' '.join(str(error).split())[:200]}; build the same dense model that was trained"
        ) from error
    return module.eval()


def _dense(content: Mapping[str, Any], factory: Callable[..., nn.Module] | None) -> nn.Module:
    name, kwargs = content["model"].get("name"), content["model"].get("kwargs")
    if not isinstance(name, str) or not isinstance(kwargs, dict):
        raise StorageError(
            f"{DESCRIPTION} says model: {content['model']!r:.80}; expected a name and kwargs; copy "
            "it again"
        )
    sizes = {"num_classes": content["num_classes"], "image_size": content["image_size"]}
    if factory is not None:
        return models.build_with(factory, name, sizes, kwargs)
    if ":" in name:
        raise ConfigError(
            f"the model is {name!r}, which is not ours; expected a function that builds it, for "
            "an import path read from storage is never followed; pass it as factory=, or --factory "
            "on the command line"
        )
    return models.build_for(name, sizes, kwargs)


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
    with _frozen(module, example) as (frozen, images):
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
    with _frozen(module, example) as (frozen, images):
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
    return program.model_proto.SerializeToString()


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
    with _frozen(module, example) as (frozen, images):
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
    with _frozen(module, example) as (frozen, images):
        program = _exported("OpenVINO", frozen, images)
        model = _attempt("OpenVINO", lambda: openvino.convert_model(program))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / OPENVINO
            openvino.save_model(model, path, compress_to_fp16=False)
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
    with _frozen(module, example) as (frozen, images):

        def lowered() -> bytes:
            program = torch.export.export(frozen, (_batch(images, 1),))
            try:
                edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
                return edge.to_executorch().buffer
            except Exception as error:  # errors of its own, with no base class but this
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise ExportError(
                    f"no ExecuTorch file: its compiler refused this model ({reason}); "
                    "set export.executorch=false to leave it out"
                ) from error

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
    with _threads(1):
        seconds = _median_seconds(lambda: program(one), 30)
    return Program(files, difference, seconds, time.perf_counter() - began)


def latency(module: nn.Module, example: Tensor, repeats: int = 30, threads: int = 1) -> float:
    """Median seconds of one forward pass on this machine's CPU, after warming up.

    Args:
        module: measured in evaluation mode on a copy, so that it is left as it is.
        example: images [N, 3, H, W]; the time is for the whole batch, so pass one image
            for the latency of one image.
        repeats: timed passes, after a third as many (at least three) that are not timed.
        threads: threads PyTorch may use, so that figures compare between machines with
            different numbers of cores.

    Raises:
        ValueError: `repeats` or `threads` is below 1.
    """
    if repeats < 1 or threads < 1:
        raise ValueError(f"latency: repeats={repeats}, threads={threads}; expected at least 1 each")
    with _frozen(module, example) as (frozen, images), _threads(threads), torch.inference_mode():
        return _median_seconds(lambda: frozen(images), repeats)


def _median_seconds(action: Callable[[], object], repeats: int) -> float:
    for _ in range(max(3, repeats // 3)):
        action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def model_card(
    summary: Mapping[str, Any],
    budget: str,
    description: Mapping[str, Any],
    notes: Sequence[str] = (),
    programs: Sequence[str] = (),
) -> str:
    """The README.md of a pruned model in Hugging Face's format: metadata, figures, how to load it.

    Args:
        summary: a run's summary (see docs/design.md); only the entry of this budget, the
            dense network's figures and the run's identity are read.
        budget: a key of `summary["budgets"]`.
        description: what `save_model` wrote.
        notes: remarks for the reader, such as an export that was not possible.
        programs: keys of `FORMATS` that were written beside the weights.
    """
    entry = summary["budgets"][budget]
    name = description["model"]["name"]
    dataset = description.get("data") or "the run's test images"
    accuracy = {"type": "accuracy", "name": "top-1, %", "value": round(entry["top1"], 4)}
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": dataset, "type": dataset, "split": "test"},
        "metrics": [accuracy],
    }
    metadata = {
        "library_name": "stp_ray",
        "pipeline_tag": "image-classification",
        "tags": ["pruning", "structured-pruning", "stimulative-training"],
        "metrics": ["accuracy"],
        "model-index": [{"name": f"{summary['run_id']}/budget-{budget}", "results": [result]}],
    }
    rows = [
        ("Top-1, %", entry["top1"], summary.get("dense_top1"), "{:.2f}"),
        ("MACs of one image", entry["macs"], summary["macs"], "{:,}"),
        ("Parameters", entry["params"], summary["params"], "{:,}"),
        (
            "CPU latency of one image, ms",
            entry.get("latency_ms"),
            entry.get("dense_latency_ms"),
            "{:.2f}",
        ),
    ]
    size, classes = description["image_size"], description.get("class_names") or ()
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        f"# {name} pruned to {budget} of its cost",
        "",
        "Pruned by stimulative training with mutating expansion (STP); not fine-tuned after "
        f"pruning. Run `{summary['run_id']}`, subnet `{entry['subnet_id']}`.",
        "",
        "| | pruned | dense |",
        "|---|---:|---:|",
        *(f"| {label} | {_cell(a, form)} | {_cell(b, form)} |" for label, a, b, form in rows),
        "",
        f"Retention: {_cell(entry.get('retention_dense'), '{:.2f} %')} of the separately trained "
        f"dense network, {_cell(entry.get('retention_main'), '{:.2f} %')} of the run's own main "
        f"network (top-1 {_cell(summary.get('main_top1'), '{:.2f} %')}).",
        *(["", _met(entry["measured"])] if entry.get("measured") else []),
        "",
        "## Input and output",
        "",
        f"RGB images `[N, 3, {size}, {size}]` in float32, scaled to 0..1, less the mean "
        f"`{description.get('mean')}` and divided by `{description.get('std')}` of each channel. "
        f"Logits `[N, {description['num_classes']}]`"
        + (f" of the classes {', '.join(classes)}." if 0 < len(classes) <= 20 else ".")
        + (f" `{DESCRIPTION}` names the classes." if len(classes) > 20 else ""),
        "",
        "## Load it",
        "",
        *_code(*_loading(name, entry["uri"])),
        "",
        f"`{WEIGHTS}` holds the weights, `{DESCRIPTION}` the architecture; neither is unpickled.",
    ]
    for kind in programs:
        where, code = _LOADING[kind]
        code = tuple(line.replace("SIZE", str(size)) for line in code)
        lines += ["", f"Without stp_ray, {where}:", "", *_code(*code)]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _loading(name: str, uri: str) -> list[str]:
    """How to load a model of that name: with the function that builds it, if it is not ours."""
    module, _, function = name.partition(":")
    given = f", factory={function}" if function else ""
    return [
        "import stp_ray",
        *([f"from {module} import {function}"] if function else []),
        "",
        f'model = stp_ray.load("{uri}"{given})  # an ordinary torch.nn.Module, in eval mode',
    ]


def _met(measured: Mapping[str, Any]) -> str:
    return (
        f"Latency budget of one image: {measured['limit_ms']:.3g} ms; measured "
        f"{measured['latency_ms']:.3g} ms, dense {measured['dense_ms']:.3g} ms "
        f"({measured['where']}, when the shape was chosen)."
    )


def _code(*lines: str) -> list[str]:
    return ["```python", *lines, "```"]


#: How a program is run where stp_ray is not installed.
_LOADING = {
    "onnx": (
        "in ONNX Runtime",
        (
            "import numpy, onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("{ONNX}")',
            "images = numpy.zeros((1, 3, SIZE, SIZE), numpy.float32)",
            'logits = session.run(None, {"images": images})[0]',
        ),
    ),
    "pt2": (
        "in PyTorch",
        (
            "import torch",
            "",
            f'program = torch.export.load("{PT2}").module()',
            "logits = program(torch.zeros(1, 3, SIZE, SIZE))",
        ),
    ),
    "openvino": (
        "in OpenVINO",
        (
            "import numpy, openvino",
            "",
            f'model = openvino.Core().compile_model("{OPENVINO}", "CPU")',
            "logits = model(numpy.zeros((1, 3, SIZE, SIZE), numpy.float32))[0]",
        ),
    ),
    "executorch": (
        "in ExecuTorch, one image at a time",
        (
            "import torch",
            "from executorch.runtime import Runtime",
            "",
            f'method = Runtime.get().load_program("{PTE}").load_method("forward")',
            "logits = method.execute([torch.zeros(1, 3, SIZE, SIZE)])[0]",
        ),
    ),
}


def _cell(value: float | int | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)


@contextmanager
def _frozen(module: nn.Module, example: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """A copy of the module on the CPU in evaluation mode, and the example beside it.

    Fused attention is off: no exporter can express it, and it would hide what a runtime
    really does.
    """
    frozen = copy.deepcopy(module).cpu().eval()
    with unfused_attention(), torch.no_grad():
        yield frozen, example.detach().cpu()


def _batch(images: Tensor, size: int) -> Tensor:
    """The images repeated or cut to a batch of this size."""
    times = -(-size // len(images))
    return images.repeat(times, *[1] * (images.dim() - 1))[:size].contiguous()


def _attempt(kind: str, action: Callable[[], Result]) -> Result:
    """Run a step of an exporter; what it cannot do becomes one line."""
    try:
        with warnings.catch_warnings(), _quiet_exporters():
            warnings.simplefilter("ignore")
            return action()
    except _EXPORTER_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ExportError(
            f"no {kind} file: PyTorch could not express this model ({reason}); "
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
        scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
        difference = ((found - expected).abs().max() / scale).item()
        if found.shape != expected.shape or not difference <= tolerance:
            raise ExportError(
                f"no {kind} file: the exported program differs from the model by {difference:.2g} "
                f"(relative, batch of {size}); expected at most {tolerance:g}"
            )
        largest = max(largest, difference)
    return largest
