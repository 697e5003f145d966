import pytest
from torch import nn

from stp_ray.config import load_config
from stp_ray.data import DataSummary
from stp_ray.elastic import Supernet
from stp_ray.errors import ConfigError
from stp_ray.stages.network import build_supernet, check_images


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
