"""Weights and description, and the model back from them."""

import pytest
import torch
from torch import nn

from stp_ray import export
from stp_ray.elastic.subnet import Subnet
from stp_ray.elastic.supernet import Supernet
from stp_ray.errors import ConfigError, ExportError, StorageError
from stp_ray.models import resnet20, resnet56

from .networks import DESCRIPTION


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
    assert content["weights_sha256"] == store.checksum("model.safetensors")
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
    with pytest.raises(ExportError, match=key):
        export.save_model(store, module, {k: v for k, v in DESCRIPTION.items() if k != key})
    with pytest.raises(ExportError, match="JSON"):
        export.save_model(store, module, {**DESCRIPTION, "space": {"divisor": torch.ones(1)}})
    assert store.names() == []


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


def test_another_folder_is_told_what_is_expected(store):
    with pytest.raises(StorageError, match=r"has no model\.json; expected the folder of a pruned"):
        export.load(store.uri)


@pytest.mark.parametrize("at", [-1, -1000])
def test_weights_that_were_damaged_or_replaced_are_refused(pruned, store, at):
    module, description = pruned
    export.save_model(store, module, description)
    data = bytearray(store.read_bytes("model.safetensors"))
    data[at] ^= 1
    store.write_bytes("model.safetensors", bytes(data))
    with pytest.raises(
        StorageError, match=r"model.safetensors has the SHA-256 .*copy both"
    ) as told:
        export.load(store.uri)
    assert "\n" not in str(told.value)


def test_a_model_that_was_saved_without_a_checksum_comes_back(pruned, store):
    module, description = pruned
    export.save_model(store, module, description)
    content = store.read_json("model.json")
    store.write_json("model.json", {k: v for k, v in content.items() if k != "weights_sha256"})
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(export.load(store.uri)(images), module.eval()(images))


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
