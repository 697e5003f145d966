"""The model card of a pruned model."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from .model import DESCRIPTION, WEIGHTS
from .programs import ONNX, OPENVINO, PT2, PTE


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
    size = description["image_size"]
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        f"# {name} pruned to {100 * entry['macs'] / summary['macs']:.1f} % of its MACs",
        "",
        "Pruned by stimulative training (STP): trained within the network that it was cut out of, "
        f"and not fine-tuned after that. Run `{summary['run_id']}`, subnet `{entry['subnet_id']}`.",
        "",
        "| | pruned | dense |",
        "|---|---:|---:|",
        *(f"| {label} | {_cell(a, form)} | {_cell(b, form)} |" for label, a, b, form in rows),
        "",
        f"Retention: {_cell(entry.get('retention_dense'), '{:.2f} %')} of the dense network, "
        f"{_cell(entry.get('retention_main'), '{:.2f} %')} of the run's own main network (top-1 "
        f"{_cell(summary.get('main_top1'), '{:.2f} %')}).",
        *(["", _met(entry["measured"])] if entry.get("measured") else []),
        "",
        "## Input and output",
        "",
        f"RGB images `[N, 3, {size}, {size}]` in float32{_resized(description)}, scaled to 0..1, "
        f"less the mean `{description.get('mean')}` and divided by `{description.get('std')}` of "
        "each channel. "
        f"Logits `[N, {description['num_classes']}]`"
        + _classes(description.get("class_names") or ()),
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
    place = json.dumps(uri, ensure_ascii=False)  # as text in Python, whatever is in it
    given = f", factory={function}" if function else ""
    return [
        "import stp_ray",
        *([f"from {module} import {function}"] if function else []),
        "",
        f"model = stp_ray.load({place}{given})  # an ordinary torch.nn.Module, in eval mode",
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


def _resized(description: Mapping[str, Any]) -> str:
    """How an image of any size becomes the one that was tested."""
    shorter = description.get("resize")
    if not shorter:
        return ""
    return f" (the shorter side brought to {shorter} px, bilinear and antialiased, then the centre)"


def _classes(names: Sequence[str]) -> str:
    """What the logits are of; a name stands as code, which no renderer takes for markup."""
    if not names:
        return "."
    if len(names) > 20:
        return f". `{DESCRIPTION}` names the classes."
    quoted = ("`" + " ".join(name.split()).replace("`", "'") + "`" for name in names)
    return f" of the classes {', '.join(quoted)}."


def _cell(value: float | int | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)
