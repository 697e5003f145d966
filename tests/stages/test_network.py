import io
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from stp_ray import backends
from stp_ray.config import load_config
from stp_ray.data import DataSummary
from stp_ray.elastic import Supernet
from stp_ray.errors import ConfigError, StorageError
from stp_ray.stages.network import build_supernet, check_images, load_weights, read_weights


def of_8_px(num_classes):
    """A network of one image size, whose BatchNorm sees one pixel."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, num_classes)
    )


def of_any_size(num_classes):
    """A network whose BatchNorm sees one pixel of an image of 4 px."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )  # fmt: skip


@pytest.fixture
def summary():
    return DataSummary([str(i) for i in range(10)], 90, 10, 20, 8, 8, 1000, False, "0")


@pytest.fixture
def pretrained(monkeypatch):
    """ResNet-18's weights of torchvision, which nobody downloads here."""
    weights = torchvision.models.resnet18(num_classes=1000).state_dict()
    monkeypatch.setattr(
        torchvision.models.ResNet18_Weights, "get_state_dict", lambda self, **_: weights
    )
    return weights


def test_weights_of_torchvision_are_ranked(pretrained, tmp_path):
    safetensors.torch.save_file(pretrained, tmp_path / "r18.safetensors")
    whole = DataSummary([str(i) for i in range(1000)], 90, 10, 20, 32, 32, 1000, False, "0")
    models = (
        {"name": "resnet18", "weights": str(tmp_path / "r18.safetensors")},
        {"name": "resnet18", "kwargs": {"weights": "IMAGENET1K_V1"}},
    )
    by_uri, by_name = (
        build_supernet(load_config({"model": model}), whole).model.state_dict() for model in models
    )
    assert not torch.equal(by_uri["layer1.0.conv1.weight"], pretrained["layer1.0.conv1.weight"])
    assert all(torch.equal(by_uri[name], by_name[name]) for name in pretrained)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_are_told_by_their_content(tmp_path, suffix):
    wanted, path = torch.nn.Linear(3, 2), tmp_path / f"weights.{suffix}"
    for save in (safetensors.torch.save_file, torch.save):
        save(wanted.state_dict(), path)
        found = torch.nn.Linear(3, 2)
        load_weights(found, str(path))
        assert torch.equal(found.weight, wanted.weight)


@pytest.fixture
def web_server():
    """Sends `content` in one go, without ranges or a length, after it answered with each status of
    `answers`. Yields the server and its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status = self.server.answers.pop(0) if self.server.answers else 200
            self.send_response(status)
            self.end_headers()
            self.wfile.write(self.server.content if status == 200 else b"")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.answers = b"", []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server, f"http://127.0.0.1:{server.server_port}/weights"
        server.shutdown()
        thread.join(10)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("save", [safetensors.torch.save, None], ids=["safetensors", "torch"])
def test_weights_may_come_from_a_server_that_sends_them_in_one_go(web_server, save):
    server, uri = web_server
    wanted, found, buffer = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2), io.BytesIO()
    torch.save(wanted.state_dict(), buffer)
    server.content = save(wanted.state_dict()) if save else buffer.getvalue()
    load_weights(found, uri)
    assert torch.equal(found.weight, wanted.weight)


@pytest.mark.timeout(60)
def test_weights_are_asked_for_again_where_the_server_does_not_answer(monkeypatch, web_server):
    monkeypatch.setattr(backends, "PAUSES", (0.01, 0.01))
    server, uri = web_server
    server.content, server.answers = b"weights", [503, 503]
    assert read_weights(uri) == b"weights"
    for answers, told in (([503] * 3, "503"), ([404], "")):
        server.answers = [*answers]
        with pytest.raises(StorageError, match=f"weights {uri} cannot be loaded: .*{told}"):
            read_weights(uri)
        assert server.answers == []


def test_a_pattern_that_matches_nothing_names_its_settings(summary):
    config = load_config({"space": {"only": ["layer9"]}})
    with pytest.raises(ConfigError, match=r"space\.ignore and space\.only: .*'layer9' matches no"):
        build_supernet(config, summary)


def test_what_goes_wrong_otherwise_is_not_called_a_pattern(summary, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("lengths 8 and 9 cannot be equal")

    monkeypatch.setattr(Supernet, "trace", fails)
    with pytest.raises(ValueError, match="lengths 8 and 9") as found:
        build_supernet(load_config({}), summary)
    assert not isinstance(found.value, ConfigError)


@pytest.mark.parametrize(
    ("supernet", "message"),
    [
        (
            {"stimulation": {"resolutions": [1.0, 0.5]}},
            r"resolutions is \(1\.0, 0\.5\), and .*does not take images of 4 px \(.*Kernel size",
        ),
        (
            {"optimisation": {"batch_size": 2}},
            r"one image a step, and .*of_8_px' cannot be trained on one \(.*more than 1 value",
        ),
    ],
)
def test_what_a_step_cannot_be_trained_on_is_found_before_it(summary, supernet, message):
    recipe = {"model": {"name": f"{__name__}:of_8_px"}, "cluster": {"num_workers": 2}}
    config = load_config(recipe)
    net = build_supernet(config, summary)
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    check_images(config, net, summary.image_size)
    with pytest.raises(ConfigError, match=message):
        check_images(load_config({**recipe, "supernet": supernet}), net, summary.image_size)
    assert net.training
    assert all(before[n].equal(tensor) for n, tensor in net.model.state_dict().items())


@pytest.mark.parametrize(
    "setting",
    ["explore.calibration_images", "explore.tuning_images", "finalize.calibration_images"],
)
def test_one_image_to_measure_statistics_on_is_found_too(summary, setting):
    config = load_config({"model": {"name": f"{__name__}:of_8_px"}}, [f"{setting}=1"])
    net = build_supernet(config, summary)
    with pytest.raises(ConfigError, match=rf"^{setting} is 1, and .*more than 1 .*raise {setting}"):
        check_images(config, net, summary.image_size)


def test_one_image_is_no_matter_where_no_statistics_are_measured_on_it(summary):
    settings = ["explore.tuning_images=1", "explore.tuning_steps=0", "explore.finalists=0"]
    config = load_config({"model": {"name": f"{__name__}:of_8_px"}}, settings)
    check_images(config, build_supernet(config, summary), summary.image_size)
    config = load_config({}, ["finalize.calibration_images=1"])  # BatchNorm sees many pixels
    check_images(config, build_supernet(config, summary), summary.image_size)


def without_values(num_classes):
    with torch.device("meta"):
        return of_8_px(num_classes)


def test_a_model_without_values_is_refused(summary):
    config = load_config({"model": {"name": f"{__name__}:without_values"}})
    with pytest.raises(ConfigError, match="on the meta device, without values"):
        build_supernet(config, summary)


def test_only_what_gets_smaller_images_has_to_do_with_one_of_them(summary):
    """A batch of one is refused to the supernet, and not to what trains on whole images."""
    smaller = {"stimulation": {"resolutions": [1.0, 0.5]}}
    recipe = {"model": {"name": f"{__name__}:of_any_size"}, "supernet": smaller}
    one = {"optimisation": {"batch_size": 1}}
    config = load_config({**recipe, "finalize": one})
    net = build_supernet(config, summary)
    check_images(config, net, summary.image_size)
    with pytest.raises(ConfigError, match=r"one image a step.*more than 1 value"):
        check_images(
            load_config({**recipe, "supernet": {**smaller, **one}}), net, summary.image_size
        )


def test_a_model_whose_subnets_do_not_run_is_refused_before_anything_is_trained(
    summary, monkeypatch
):
    config = load_config({"model": {"name": f"{__name__}:of_any_size"}})
    net = build_supernet(config, summary)

    def fails(*args):
        raise RuntimeError("shape '[11, 16]'\nis invalid")

    monkeypatch.setattr(Supernet, "_run", fails)
    with pytest.raises(ConfigError, match=r"smallest subnet of .* does not run .*space\.ignore"):
        check_images(config, net, summary.image_size)


def frozen(num_classes):
    return of_8_px(num_classes).requires_grad_(False)


def test_a_model_with_nothing_to_train_is_refused(summary):
    config = load_config({"model": {"name": f"{__name__}:frozen"}})
    with pytest.raises(ConfigError, match="no parameter that is trained; expected some"):
        build_supernet(config, summary)


def in_a_larger_file(model):
    return {"epoch": 3, "state_dict": model.state_dict()}


def of_a_wrapped_model(model):
    return {f"module.{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        (in_a_larger_file, "it holds 'epoch', 'state_dict', and the model begins with '0.weight'"),
        (of_a_wrapped_model, "it holds 'module.0.weight', 'module.0.bias', 'module.1.weight'"),
        (lambda model: model, "it is damaged, or holds more than tensors"),
        (lambda model: 3, "it holds int"),
        (lambda model: of_8_px(11).state_dict(), "size mismatch for 4.weight"),
    ],
)
def test_weights_that_do_not_fit_say_what_they_are(tmp_path, saved, told):
    model = of_8_px(10)
    torch.save(saved(model), tmp_path / "mine.pt")
    with pytest.raises(StorageError) as refused:
        load_weights(model, str(tmp_path / "mine.pt"))
    line = str(refused.value)
    assert told in line and "expected a state dict of the model" in line and "\n" not in line


def test_weights_that_are_not_finite_or_no_weights_at_all_are_refused(tmp_path):
    model = of_8_px(10)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({**state, "1.running_mean": state["1.running_mean"].log()}, tmp_path / "inf.pt")
    load_weights(model, str(tmp_path / "inf.pt"))  # as the masks of some attention
    torch.save({**state, "1.running_var": state["1.running_var"] * math.nan}, tmp_path / "nan.pt")
    state["4.weight"][0, 0] = math.inf
    torch.save(state, tmp_path / "mine.pt")
    (tmp_path / "text.pt").write_text("epoch 1\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name, told in (
        ("mine.pt", "'4.weight' holds values that are not finite"),
        ("nan.pt", "'1.running_var' holds values that are not finite"),
        ("text.pt", "it is damaged, or holds more than tensors"),
        ("empty.pt", "it is damaged, or holds more than tensors"),
    ):
        with pytest.raises(StorageError, match=told):
            load_weights(model, str(tmp_path / name))


def test_weights_of_a_state_dict_are_loaded(tmp_path):
    given, model = of_8_px(10), of_8_px(10)
    torch.save(given.state_dict(), tmp_path / "mine.pt")
    load_weights(model, str(tmp_path / "mine.pt"))
    for name, tensor in given.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
