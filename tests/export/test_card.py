"""The model card."""

import ast
import re

import pytest
import yaml

from stp_ray import export

from .alone import alone
from .networks import DESCRIPTION

SUMMARY = {
    "run_id": "demo-1a2b",
    "storage": "runs",
    "dense_top1": 98.0,
    "main_top1": 97.5,
    "macs": 4_000_000,
    "params": 270_000,
    "budgets": {
        "0.15": {
            "top1": 96.1,
            "retention_dense": 98.061,
            "retention_main": 98.564,
            "macs": 590_000,
            "params": 40_123,
            "latency_ms": 0.51,
            "dense_latency_ms": 1.9,
            "subnet_id": "abcdef012345",
            "uri": "runs/demo-1a2b/budget-0.15",
        }
    },
    "seconds": 12.0,
}


def test_model_card_states_the_figures_and_how_to_load():
    card = export.model_card(SUMMARY, "0.15", DESCRIPTION, notes=["no ONNX file: reason"])
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    result = metadata["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "accuracy", "name": "top-1, %", "value": 96.1}]
    assert result["dataset"]["name"] == "digits"
    assert "# resnet20 pruned to 14.8 % of its MACs\n" in card
    assert "| Top-1, % | 96.10 | 98.00 |" in card
    assert "| MACs of one image | 590,000 | 4,000,000 |" in card
    assert "98.06 %" in card and "98.56 %" in card
    assert 'stp_ray.load("runs/demo-1a2b/budget-0.15")' in card
    assert "no ONNX file: reason" in card


def test_model_card_fills_in_the_size_where_code_has_it_alone():
    entry = {**SUMMARY["budgets"]["0.15"], "uri": "s3://bucket/RESIZED"}
    card = export.model_card(
        {**SUMMARY, "budgets": {"0.15": entry}}, "0.15", DESCRIPTION, programs=["onnx"]
    )
    assert 'stp_ray.load("s3://bucket/RESIZED")' in card
    assert "numpy.zeros((1, 3, 12, 12), numpy.float32)" in card


@pytest.mark.parametrize("uri", ["file:///runs 'o\"dd", "/runs/a\\nb", "s3://b/ü"])
def test_model_card_has_code_that_compiles(uri):
    entry = {**SUMMARY["budgets"]["0.15"], "uri": uri}
    card = export.model_card({**SUMMARY, "budgets": {"0.15": entry}}, "0.15", DESCRIPTION)
    (line,) = [line for line in card.splitlines() if line.startswith("model = stp_ray.load(")]
    (call,) = [node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)]
    assert ast.literal_eval(call.args[0]) == uri


def test_model_card_loads_a_model_of_ones_own_by_its_factory():
    own = {**DESCRIPTION, "model": {"name": "nets.mine:build", "kwargs": {}}}
    card = export.model_card(SUMMARY, "0.15", own)
    assert "from nets.mine import build" in card
    assert 'stp_ray.load("runs/demo-1a2b/budget-0.15", factory=build)' in card


def test_model_card_says_what_was_not_measured():
    entry = {**SUMMARY["budgets"]["0.15"], "retention_dense": None, "latency_ms": None}
    summary = {**SUMMARY, "dense_top1": None, "budgets": {"0.15": entry}}
    card = export.model_card(summary, "0.15", DESCRIPTION)
    assert "| Top-1, % | 96.10 | not measured |" in card
    assert "Retention: not measured of the dense network, 98.56 % of" in card


def test_model_card_names_classes_as_they_are():
    names = ["<img src=x>", "__background__", "tench, Tinca tinca", "tick`\ned", "fifth"]
    card = export.model_card(SUMMARY, "0.15", {**DESCRIPTION, "class_names": names})
    told = "`<img src=x>`, `__background__`, `tench, Tinca tinca`, `tick' ed`, `fifth`."
    assert f"of the classes {told}" in card


def test_model_card_says_how_images_are_brought_to_size():
    assert "shorter side" not in export.model_card(SUMMARY, "0.15", DESCRIPTION)
    card = export.model_card(SUMMARY, "0.15", {**DESCRIPTION, "resize": 14})
    assert "`[N, 3, 12, 12]` in float32 (the shorter side brought to 14 px, bilinear" in card


def test_model_card_says_how_a_latency_budget_was_met():
    met = {"latency_ms": 1.234, "limit_ms": 1.25, "dense_ms": 2.5, "where": "1 CPU thread, PyTorch"}
    entry = {**SUMMARY["budgets"]["0.15"], "measured": met}
    summary = {**SUMMARY, "budgets": {"latency-0.5": entry}}
    card = export.model_card(summary, "latency-0.5", DESCRIPTION)
    assert "Latency budget of one image: 1.25 ms; measured 1.23 ms, dense 2.5 ms (1 CPU" in card


def test_model_card_is_one_that_hugging_face_reads():
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(export.model_card(SUMMARY, "0.15", DESCRIPTION)).data
    assert data.library_name == "stp_ray" and data.pipeline_tag == "image-classification"
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == (
        "accuracy",
        96.1,
        "test",
    )
    assert data.model_name == "demo-1a2b/budget-0.15"


def test_the_code_of_a_model_card_runs_without_stp_ray(held_out, write):
    pytest.importorskip("onnxruntime")
    formats = ["onnx", "pt2"]
    for kind in formats:
        folder, _ = write(kind)
    described = {**DESCRIPTION, "image_size": held_out[1].shape[-1]}
    card = export.model_card(SUMMARY, "0.15", described, programs=formats)
    first, *blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "stp_ray" in first and len(blocks) == 2
    code = "".join(f"{block}\nassert logits.shape == (1, 10)\n" for block in blocks)
    alone(folder, f"import sys\nsys.path.append(sys.argv[1])\n{code}")
