import functools
import io
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
import yaml
from torch import nn

from stp_ray import export
from stp_ray.artifacts import Store
from stp_ray.config import load_config
from stp_ray.data import eval_batches, load
from stp_ray.elastic.subnet import Subnet
from stp_ray.elastic.supernet import Supernet
from stp_ray.errors import ConfigError, StorageError
from stp_ray.method import calibrate
from stp_ray.models import build_model, resnet20, resnet56


class Small(nn.Module):
    """Convolution, BatchNorm, a residual addition and a flattening that keeps the batch free."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        x = torch.relu(self.norm(self.stem(images)))
        x = torch.relu(x + self.branch(x))
        return self.head(x.mean((2, 3)))


class BakedBatch(nn.Module):
    """Only ever answers for two images."""

    def forward(self, images):
        return images.reshape(2, -1)[:, :4]


class Stateful(nn.Module):
    """Its exported form is a different function: the module scales by what it counts."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return images.flatten(1)[:, :4] * self.calls


@pytest.fixture
def module():
    torch.manual_seed(0)
    small = Small()
    small.norm.running_mean.normal_()
    small.norm.running_var.uniform_(0.5, 2)
    return small


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "model")


@pytest.fixture
def example():
    return torch.randn(1, 3, 12, 12)


DESCRIPTION = {
    "model": {"name": "resnet20", "kwargs": {"num_classes": 5}},
    "num_classes": 5,
    "image_size": 12,
    "space": {"divisor": None, "min_ratio": 0.125},
    "subnet": '{"dropped": ["b"], "widths": {"a": 4}}',
    "data": "digits",
}


def test_saved_model_holds_weights_and_description(module, store):
    written = export.save_model(store, module, DESCRIPTION)
    loaded = store.load_tensors("model.safetensors")
    state = module.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    content = store.read_json("model.json")
    assert content["format"] == export.FORMAT
    assert content["subnet"] == {"dropped": ["b"], "widths": {"a": 4}}
    assert content["model"] == DESCRIPTION["model"]
    assert written == {name: store.checksum(name) for name in store.names()}


def test_shared_and_sliced_tensors_are_saved_whole_and_small(module, store):
    module.tied = module.head
    module.head.weight = nn.Parameter(torch.randn(100, 8)[:5])
    export.save_model(store, module, DESCRIPTION)
    loaded = store.load_tensors("model.safetensors")
    assert torch.equal(loaded["tied.weight"], loaded["head.weight"])
    assert loaded["head.weight"].shape == (5, 8)
    assert len(store.read_bytes("model.safetensors")) < 8000


@pytest.mark.parametrize("key", ["model", "num_classes", "image_size", "space", "subnet"])
def test_a_description_that_cannot_rebuild_the_model_is_refused(module, store, key):
    with pytest.raises(export.ExportError, match=key):
        export.save_model(store, module, {k: v for k, v in DESCRIPTION.items() if k != key})
    with pytest.raises(export.ExportError, match="JSON"):
        export.save_model(store, module, {**DESCRIPTION, "space": {"divisor": torch.ones(1)}})
    assert store.names() == []


@pytest.fixture
def pruned():
    """An extracted ResNet-20 with a dropped block, and its description."""
    torch.manual_seed(0)
    dense = resnet20(num_classes=5)
    net = Supernet.trace(dense, torch.zeros(1, 3, 16, 16), divisor=4, min_ratio=0.25)
    uniform = net.space.uniform(0.5)
    subnet = net.space.canonical(Subnet(uniform.widths, [net.space.blocks[0].name]))
    description = {
        **DESCRIPTION,
        "model": {"name": "resnet20", "kwargs": {}},
        "image_size": 16,
        "space": {"divisor": 4, "min_ratio": 0.25},
        "subnet": subnet.to_json(),
    }
    return net.extract(subnet), description


def test_a_saved_model_comes_back_the_same(pruned, store):
    module, description = pruned
    export.save_model(store, module, description)
    loaded = export.load(store.uri)
    assert not loaded.training
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(loaded(images), module.eval()(images))


def test_a_model_of_the_users_own_comes_back_through_a_factory_only(pruned, store):
    module, description = pruned
    own = {"name": "os:abort", "kwargs": {}}
    export.save_model(store, module, {**description, "model": own})
    with pytest.raises(ConfigError, match="factory="):
        export.load(store.uri)
    loaded = export.load(store.uri, factory=resnet20)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), module.eval()(images))
    with pytest.raises(StorageError, match="does not fit"):
        export.load(store.uri, factory=resnet56)


@pytest.mark.parametrize("key", ["model", "num_classes", "image_size", "space", "subnet"])
def test_a_description_that_was_damaged_is_told(pruned, store, key):
    module, description = pruned
    export.save_model(store, module, description)
    content = store.read_json("model.json")
    store.write_json("model.json", {k: v for k, v in content.items() if k != key})
    with pytest.raises(StorageError, match=f"model.json lacks {key}; expected"):
        export.load(store.uri)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("image_size", "16", "says image_size: '16'"),
        ("space", None, "says space: None"),
        ("space", {"divisor": 0}, "describes no network: divisor is 0"),
        ("space", {"width": 4}, "describes no network: .*unexpected keyword"),
        ("subnet", 3, "says subnet: 3"),
        ("subnet", {"widths": {}}, "describes no network: not a subnet"),
        ("model", "resnet20", "says model: 'resnet20'"),
        ("model", {"name": "resnet20"}, "says model: .*expected a name and kwargs"),
    ],
)
def test_a_damaged_value_in_a_description_is_told(pruned, store, key, value, words):
    module, description = pruned
    export.save_model(store, module, description)
    store.write_json("model.json", {**store.read_json("model.json"), key: value})
    with pytest.raises(StorageError, match=words) as caught:
        export.load(store.uri)
    assert "\n" not in str(caught.value)


def fails(num_classes):
    raise RuntimeError("no such layer")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (resnet20(), "is CifarResNet.*; expected a function that returns a torch.nn.Module"),
        (lambda: 3, "returned int; expected a torch.nn.Module"),
        (fails, "RuntimeError: no such layer"),
    ],
)
def test_a_factory_that_builds_no_model_is_told(pruned, store, factory, words):
    module, description = pruned
    export.save_model(store, module, description)
    with pytest.raises(ConfigError, match=words) as caught:
        export.load(store.uri, factory=factory)
    assert "\n" not in str(caught.value)


def test_an_unknown_format_is_refused(pruned, store):
    module, description = pruned
    export.save_model(store, module, description)
    store.write_json("model.json", {**store.read_json("model.json"), "format": "other/2"})
    with pytest.raises(StorageError, match="other/2"):
        export.load(store.uri)


@pytest.mark.parametrize("training", [True, False])
def test_pt2_computes_the_same_for_any_batch(module, example, training):
    module.train(training)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    exported = export.to_pt2(module, example)
    assert 0 <= exported.difference <= 1e-4
    assert 0 < exported.latency_s < exported.seconds
    (data,) = exported.files.values()
    assert zipfile.is_zipfile(io.BytesIO(data))
    assert module.training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    # As another program would read it.
    program = torch.export.load(io.BytesIO(data)).module()
    module.eval()
    for size in (1, 2, 7):
        images = torch.randn(size, 3, 12, 12)
        torch.testing.assert_close(program(images), module(images))


def test_onnx_computes_the_same_for_any_batch(module, example):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    data = export.to_onnx(module, example).files["model.onnx"]
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    module.eval()
    for size in (1, 2, 7):
        images = torch.randn(size, 3, 12, 12)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        torch.testing.assert_close(found, module(images), rtol=1e-4, atol=1e-5)


#: Runs a program where only site-packages can be imported: an installation in development mode
#: is found through a .pth file, which -S leaves out.
STRANGER = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("stp_ray") is None
import numpy
images = numpy.load("images.npy")
kind = sys.argv[2]
if kind == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession("model.onnx")
    logits = session.run(None, {"images": images})[0]
elif kind == "openvino":
    import openvino
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    logits = openvino.Core().compile_model("model.xml", "CPU", settings)(images)[0]
elif kind == "executorch":
    import torch
    from executorch.runtime import Runtime
    method = Runtime.get().load_program("model.pte").load_method("forward")
    one = lambda image: method.execute([torch.from_numpy(image[None])])[0].numpy().copy()
    logits = numpy.concatenate([one(image) for image in images])
else:
    import torch
    logits = torch.export.load("model.pt2").module()(torch.from_numpy(images)).detach().numpy()
numpy.save("logits.npy", logits)
"""


def alone(folder, code, *arguments):
    """Run code in a process that cannot import stp_ray."""
    path = folder / "stranger.py"
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(path), str(Path(torch.__file__).parents[1]), *arguments],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def held_out():
    """The test images of the demo, and a network of its smallest budget with their statistics: its
    logits lie closer together than those of a trained one."""
    config = load_config("demo")
    data = load(config.data)
    images = torch.cat([x for x, _ in eval_batches(data.test, config.data, 512)])
    torch.manual_seed(0)
    net = Supernet.trace(build_model(config.model.name, num_classes=10), images[:1])
    subnet = net.space.sample(random.Random(3), budget=config.budgets[-1])
    return net.extract(subnet, calibrate(net, subnet, images.split(90))).eval(), images


@pytest.fixture(scope="module")
def write(held_out, tmp_path_factory):
    """Writes that network in a format, once: the folder, and what `write_programs` returned."""
    folder = tmp_path_factory.mktemp("programs")
    module, images = held_out

    @functools.cache
    def written(kind):
        return folder, export.write_programs(Store(folder), module, images[:2], [kind])

    return written


@pytest.mark.parametrize("kind", ["onnx", "pt2", "openvino", "executorch"])
def test_a_program_answers_as_the_module_where_stp_ray_is_not_installed(held_out, write, kind):
    pytest.importorskip({"onnx": "onnxruntime", "pt2": "torch"}.get(kind, kind))
    module, images = held_out
    folder, (written, figures, notes) = write(kind)
    assert notes == [] and export.FILES[kind] in written
    assert figures[kind]["difference"] <= export.TOLERANCE
    assert 0 < figures[kind]["latency_ms"] < 1e3 * figures[kind]["seconds"]
    numpy.save(folder / "images.npy", images.numpy())
    alone(folder, STRANGER, kind)
    found = torch.from_numpy(numpy.load(folder / "logits.npy"))
    with torch.no_grad():
        expected = module(images)
    assert (found - expected).abs().max() <= export.TOLERANCE * expected.abs().max()
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert len(found) == 360 and len(set(expected.argmax(1).tolist())) > 1


def test_a_program_that_computes_something_else_is_refused(example):
    with pytest.raises(export.ExportError, match="differs from the model"):
        export.to_pt2(Stateful(), example)


def test_what_cannot_be_exported_becomes_a_note_and_not_a_failure(example, store):
    written, _, notes = export.write_programs(store, BakedBatch(), example, ["pt2"])
    assert len(notes) == 1 and notes[0].startswith("no .pt2 file") and "\n" not in notes[0]
    assert written == {}
    assert "export.pt2=false" in notes[0]
    assert store.names() == []


def test_a_missing_package_becomes_a_note(module, example, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    written, figures, notes = export.write_programs(store, module, example)
    assert len(notes) == 1 and "stp_ray[export]" in notes[0] and "\n" not in notes[0]
    assert written == {"model.pt2": store.checksum("model.pt2")}
    assert figures.keys() == {"pt2"}
    assert figures["pt2"].keys() == {"difference", "latency_ms", "seconds"}


def test_an_error_of_executorchs_own_becomes_a_note(module, example, store, monkeypatch):
    def refuse(*_, **__):
        raise type("SpecViolationError", (Exception,), {})("unsupported\nby this backend")

    for name, content in {
        "executorch.backends.xnnpack.partition.xnnpack_partitioner": {"XnnpackPartitioner": dict},
        "executorch.exir": {"to_edge_transform_and_lower": refuse},
        "executorch.extension.pybindings": {"portable_lib": None},
        "executorch.runtime": {"Runtime": None},
    }.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            path = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        stand_in = ModuleType(name)
        vars(stand_in).update(content)
        monkeypatch.setitem(sys.modules, name, stand_in)
    _, _, (note,) = export.write_programs(store, module, example, ["executorch"])
    assert "(unsupported)" in note and "export.executorch=false" in note
    assert store.names() == []


def test_nothing_is_exported_unasked(module, example, store):
    assert export.write_programs(store, module, example, []) == ({}, {}, [])
    assert store.names() == []


def test_latency_is_a_median_and_restores_the_thread_count(module, example, monkeypatch):
    before = torch.get_num_threads()
    ticks = iter([0.0, 1.0, 0.0, 9.0, 0.0, 2.0])
    monkeypatch.setattr(export.time, "perf_counter", lambda: next(ticks))
    module.train()
    assert export.latency(module, example, repeats=3) == 2.0
    assert module.training
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="repeats=0"):
        export.latency(module, example, repeats=0)


def test_latency_grows_with_the_work(module):
    little = export.latency(module, torch.randn(1, 3, 8, 8), repeats=15)
    much = export.latency(module, torch.randn(8, 3, 96, 96), repeats=15)
    assert 0 < little < much


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
    assert "Retention: not measured of" in card


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
