"""The same network for other runtimes."""

import io
import sys
import zipfile
from types import ModuleType

import numpy
import pytest
import torch

from stp_ray import export
from stp_ray.errors import ExportError
from stp_ray.export import programs

from .alone import alone
from .networks import BakedBatch, Stateful


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
    with pytest.raises(ExportError, match="differs from the model"):
        export.to_pt2(Stateful(), example)


def test_what_cannot_be_exported_becomes_a_note_and_not_a_failure(example, store):
    written, _, notes = export.write_programs(store, BakedBatch(), example, ["pt2"])
    assert len(notes) == 1 and notes[0].startswith("no .pt2 file") and "\n" not in notes[0]
    assert written == {}
    assert "export.pt2=false" in notes[0]
    assert store.names() == []


def test_what_a_runtime_refuses_becomes_a_note(store):
    """Whose errors are no subclass of anything but Exception."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    doubled = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()).double()
    example = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    written, _, notes = export.write_programs(store, doubled, example, ["onnx"])
    assert len(notes) == 1 and notes[0].startswith("no ONNX file") and "\n" not in notes[0]
    assert written == {} and store.names() == []
    with pytest.raises(ExportError, match="no ONNX file"):
        programs.onnx_session(b"garbage")


def test_a_program_whose_answers_have_another_shape_is_refused(module, example):
    with pytest.raises(ExportError, match=r"answers \[2, 5\] to a batch of 3; expected \[3, 5\]"):
        programs._compare(".pt2", module, lambda x: module(x)[:2], example, 1e-4, (3,))


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
