import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stp_ray.elastic import Supernet
from stp_ray.errors import ConfigError
from stp_ray.models import (
    OWN,
    BasicBlock,
    CifarResNet,
    accepted,
    build_for,
    build_model,
    find_factory,
    redraw,
    untrained,
)


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A user's module on the Python path."""
    (tmp_path / "users_own_models.py").write_text(
        "import torch\n"
        "def small(num_classes, width=4):\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, width, 1), torch.nn.Flatten(),\n"
        "                               torch.nn.Linear(width * 16, num_classes))\n"
        "def sized(image_size, num_classes=2):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(),\n"
        "                               torch.nn.Linear(3 * image_size ** 2, num_classes))\n"
        "def fixed():\n"
        "    return torch.nn.Flatten()\n"
        "def wrong(num_classes):\n"
        "    return num_classes\n"
        "LIST = []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_own_models"
    sys.modules.pop("users_own_models", None)


def test_a_block_ends_in_a_relu_after_the_shortcut():
    torch.manual_seed(0)
    out = BasicBlock(4, 8, 2)(torch.randn(2, 4, 8, 8))
    assert out.shape == (2, 8, 4, 4)
    assert out.min() == 0


@pytest.mark.parametrize(
    ("name", "depth", "params", "mega_macs"),
    [("resnet20", 20, 0.27, 41), ("resnet56", 56, 0.86, 126), ("resnet110", 110, 1.73, 253)],
)
def test_cifar_resnets_have_the_depth_and_size_of_the_paper(name, depth, params, mega_macs):
    model = build_model(name, num_classes=10)
    assert type(model) is CifarResNet
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert (
        len([m for m in layers if not isinstance(m, nn.Conv2d) or m.kernel_size != (1, 1)]) == depth
    )
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == params
    assert [s[0].conv1.out_channels for s in (model.layer1, model.layer2, model.layer3)] == [
        16,
        32,
        64,
    ]
    with FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.zeros(1, 3, 32, 32, device="meta"))
    assert round(counter.get_total_flops() / 2e6) == mega_macs


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("size", [4, 32])
def test_our_models_take_any_image_size_and_class_count(name, size):
    model = build_model(name, num_classes=7, image_size=size).eval()
    with torch.no_grad():
        images = torch.randn(2, 3, size, size)
        out = model(images)
    assert out.shape == (2, 7)
    assert not torch.allclose(out[0], out[1])


def test_weights_are_those_of_the_seed():
    torch.manual_seed(3)
    one = build_model("resnet20", num_classes=10).state_dict()
    torch.manual_seed(3)
    other = build_model("resnet20", num_classes=10).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("depth", [1, 18, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ConfigError, match=rf"depth is {depth}; expected 6n \+ 2"):
        CifarResNet(depth)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_b_16", "swin_t"])
def test_torchvisions_models_by_name(name):
    with torch.device("meta"):
        model = build_model(name, num_classes=7, image_size=64)
    assert model.__class__.__module__.startswith("torchvision.models")
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert heads[-1].out_features == 7


def test_a_users_model_by_import_path(factories):
    model = build_model(f"{factories}:small", num_classes=6, image_size=4, width=5)
    assert model(torch.zeros(2, 3, 4, 4)).shape == (2, 6)
    assert build_model(f"{factories}:sized", num_classes=3, image_size=5)[1].in_features == 75
    assert isinstance(build_model(f"{factories}:fixed", num_classes=3), nn.Flatten)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet21", r"unknown model 'resnet21'; did you mean 'resnet\d+'\?"),
        ("mobilnet_v2", "did you mean 'mobilenet_v2'"),
        ("qqqqqq", "unknown model 'qqqqqq'; expected one of resnet20"),
        ("fasterrcnn_resnet50_fpn", "unknown model"),
        ("no_such_module:build", "cannot be imported: No module named 'no_such_module'"),
        ("users_own_models:no_such_name", "cannot be imported: .*no_such_name"),
        (":build", "cannot be imported"),
        ("users_own_models:LIST", "is not callable; expected a function"),
        ("users_own_models:wrong", r"returned int; expected a torch\.nn\.Module"),
    ],
)
def test_names_that_lead_nowhere_say_so_in_one_line(factories, name, words):
    with pytest.raises(ConfigError, match=words) as caught:
        build_model(name, num_classes=3)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_module_that_fails_when_it_is_run_says_why(factories, tmp_path):
    (tmp_path / "users_own_models.py").write_text("raise RuntimeError('no licence\\nfor this')\n")
    with pytest.raises(ConfigError, match="cannot be imported: no licence for this"):
        build_model(f"{factories}:small", num_classes=3)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "users_own_models:small"])
def test_arguments_that_do_not_fit_are_named(factories, name):
    with pytest.raises(
        ConfigError, match=r"cannot be built with .*odd.*change model\.kwargs"
    ) as caught:
        build_model(name, num_classes=3, odd=1)
    assert "\n" not in str(caught.value)
    assert "the function: it gets num_classes and image_size if it has such" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet18", "IMAGENET1K_V1"),
        ("googlenet", "IMAGENET1K_V1"),
        ("inception_v3", "IMAGENET1K_V1"),
    ],
)
def test_the_same_network_is_built_without_its_trained_weights(name, weights, monkeypatch):
    """Offline, and for what is loaded over it anyway."""
    loaded = []
    monkeypatch.setattr(
        torchvision.models.get_model_weights(name), "get_state_dict", lambda self, **_: {}
    )
    monkeypatch.setattr(
        torch.nn.Module, "load_state_dict", lambda self, *_, **__: loaded.append(self)
    )
    given = {"weights": weights}
    trained = build_for(name, {}, given)
    fresh = build_for(name, {}, untrained(name, given))
    assert len(loaded) == 1
    shapes = [{key: t.shape for key, t in net.state_dict().items()} for net in (trained, fresh)]
    assert shapes[0] == shapes[1]
    assert getattr(trained, "transform_input", None) == getattr(fresh, "transform_input", None)
    assert untrained("mine:build", given) == given


def test_a_users_own_arguments_go_before_ours(factories):
    assert build_model(f"{factories}:small", num_classes=6, **{"width": 2})[0].out_channels == 2
    model = build_model("resnet20", num_classes=6)
    assert model.fc.out_features == 6


def test_arguments_of_the_recipe_go_before_those_of_the_data(factories):
    data = {"num_classes": 10, "image_size": 64}
    assert build_for("resnet20", data, {"num_classes": 3}).fc.out_features == 3
    with torch.device("meta"):
        vit = build_for("vit_b_16", data, {"image_size": 32})
    assert vit.image_size == 32 and vit.heads.head.out_features == 10


def test_a_factory_that_fails_says_why_in_one_line(factories):
    with pytest.raises(ConfigError, match=r"KeyError: 'NOPE'; change model\.kwargs"):
        build_model("resnet18", num_classes=3, weights="NOPE")


def test_only_what_a_factory_takes_is_offered():
    offered = {"num_classes": 3, "image_size": 32}
    assert accepted(lambda: None, offered) == {}
    assert accepted(lambda num_classes: None, offered) == {"num_classes": 3}
    assert accepted(lambda image_size: None, offered) == {"image_size": 32}
    assert accepted(lambda **kwargs: None, offered) == {"num_classes": 3}
    assert accepted(lambda image_size, **kwargs: None, offered | {"image_size": None}) == {
        "num_classes": 3
    }


def test_ours_go_before_torchvisions():
    assert find_factory("resnet20") is OWN["resnet20"]
    assert find_factory("resnet18").__module__ == "torchvision.models.resnet"


def filled(model):
    """The model with the same number everywhere."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def test_a_convolutional_network_is_redrawn_as_ours_are_first_drawn():
    torch.manual_seed(0)
    drawn, first = redraw(filled(build_model("resnet20", num_classes=10))), CifarResNet(20)
    wanted = dict(first.named_parameters())
    for name, parameter in drawn.named_parameters():
        if parameter.numel() >= 400:  # of fewer the spread says little
            spread = wanted[name].std().item()
            assert parameter.std().item() == pytest.approx(spread, rel=0.15), name
        assert parameter.mean().item() == pytest.approx(wanted[name].mean().item(), abs=0.1), name
    biased = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert (redraw(filled(biased))[0].bias == 0).all()


def test_a_convolution_is_redrawn_by_its_default_where_there_is_no_batch_norm():
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3)
    wanted = layer.weight.std().item()
    assert redraw(filled(nn.Sequential(layer)))[0].weight.std().item() == pytest.approx(
        wanted, rel=0.05
    )


def test_a_narrowed_transformer_is_redrawn_for_its_own_widths():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(8, 4, 2, 4, 64, 128, num_classes=10)
    net = Supernet.trace(filled(model), torch.zeros(1, 3, 8, 8))
    small = redraw(net.extract(net.space.uniform(0.5)))
    kept = {name for name, p in small.named_parameters() if (p == 0.5).all()}
    assert kept == {"class_token", "encoder.pos_embedding"}, "which their module holds itself"
    for name, weight in small.named_parameters():
        if name.endswith("in_proj_weight"):  # a matrix of [rows, columns] by Glorot's rule
            assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.1)


def test_what_is_redrawn_is_that_of_torchs_seed():
    models = [build_model(name, num_classes=10) for name in ("resnet20", "resnet20")]
    for model in models:
        torch.manual_seed(3)
        redraw(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_layer_that_can_draw_its_own_weights_does():
    class OwnAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.zeros(6, 2))
            self.scale = nn.Parameter(torch.zeros(1))

        def reset_parameters(self):
            nn.init.ones_(self.in_proj_weight)
            nn.init.ones_(self.scale)

    assert all((parameter == 1).all() for parameter in redraw(OwnAttention()).parameters())
