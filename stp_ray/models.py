"""Dense classifiers by name: ours for CIFAR, torchvision's, or the user's own by import path."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError, StpError


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, figure 2). [B, C, H, W]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNets of He et al. 2016, section 4.2: 6n + 2 layers, 16-32-64 channels.

    Where the width changes the shortcut is a 1 x 1 convolution (their option B), so that each
    stage has a residual stream of its own. Depth 20: 0.27 M parameters, 56: 0.86 M, 110: 1.73 M.

    Input [B, 3, H, W] of any size of at least 4 px, output logits [B, num_classes].
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ConfigError(f"depth is {depth}; expected 6n + 2, such as 20, 56 or 110")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, width = (depth - 2) // 6, 16
        stages = []
        for stage, channels in enumerate((16, 32, 64), start=1):
            layer = []
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                layer.append(BasicBlock(width, channels, stride))
                width = channels
            stages.append(nn.Sequential(*layer))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)
        return self.fc(x.mean(dim=(2, 3)))


def resnet20(num_classes: int = 10) -> CifarResNet:
    """ResNet-20 for images of 32 px: 0.27 M parameters, 41 M MACs."""
    return CifarResNet(20, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """ResNet-56 for images of 32 px: 0.86 M parameters, 126 M MACs."""
    return CifarResNet(56, num_classes)


def resnet110(num_classes: int = 10) -> CifarResNet:
    """ResNet-110 for images of 32 px: 1.73 M parameters, 253 M MACs."""
    return CifarResNet(110, num_classes)


OWN: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet110": resnet110,
}


def build_model(
    name: str, *, num_classes: int, image_size: int | None = None, **kwargs: Any
) -> nn.Module:
    """A dense classifier with fresh weights.

    Args:
        name: one of ours (`resnet20`, `resnet56`, `resnet110`), a torchvision classification
            model, or `package.module:function` for a function that returns an `nn.Module`.
        num_classes: passed on where the factory takes it.
        image_size: in pixels; passed on where the factory names an `image_size`.
        kwargs: passed on.

    Raises:
        ConfigError: unknown name (suggests the nearest), or arguments that do not fit.
    """
    return build_for(name, {"num_classes": num_classes, "image_size": image_size}, kwargs)


def build_for(name: str, data: Mapping[str, Any], kwargs: Mapping[str, Any]) -> nn.Module:
    """As `build_model`, with the `num_classes` and `image_size` of some data, before which go
    those that `kwargs` may name."""
    return build_with(find_factory(name), name, data, kwargs)


def untrained(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for the same network without the trained weights of torchvision, which it would
    download. Two of its functions go by them in other arguments too. A function of the user's,
    whose name has a ":", gets what it was given."""
    if ":" in name or not kwargs.get("weights"):
        return dict(kwargs)
    implied: dict[str, Any] = {
        "googlenet": {"transform_input": True, "aux_logits": False},
        "inception_v3": {"transform_input": True},
    }.get(name, {})
    return {**implied, **kwargs, "weights": None}


def build_with(
    factory: Callable[..., Any], name: str, data: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> nn.Module:
    """The same by a function that is at hand, whatever its name."""
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ConfigError(
            f"what builds {name!r} is {' '.join(repr(factory).split())[:60]}; expected a function "
            "that returns a torch.nn.Module"
        )
    given = {**accepted(factory, data), **kwargs}
    try:
        model = factory(**given)
    except StpError:
        raise
    except Exception as error:  # whatever a user's own function raises
        own = ", or the function: it gets num_classes and image_size if it has such parameters"
        raise ConfigError(
            f"model {name!r} cannot be built with {given}: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}; change model.kwargs"
            f"{own if isinstance(error, TypeError) else ''}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model {name!r} returned {type(model).__name__}; expected a torch.nn.Module"
        )
    return model


@torch.no_grad()
def redraw(model: nn.Module) -> nn.Module:
    """Fresh weights for a network of any widths, such as one that was cut out of another [ours].

    Convolutions of a network with BatchNorm get theirs by the rule of ResNets (He et al. 2015,
    fan-out), attention by that of Glorot and Bengio 2010, all others by the defaults of their
    layers. A parameter that a module holds itself, such as a class token, stays as it is.

    Args:
        model: changed in place.

    Returns:
        The model.
    """
    with_norms = any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and with_norms:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                layer.bias.zero_()
        elif callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
        elif isinstance(inputs := getattr(layer, "in_proj_weight", None), Tensor):
            nn.init.xavier_uniform_(inputs)
            if isinstance(bias := getattr(layer, "in_proj_bias", None), Tensor):
                bias.zero_()
    return model


def find_factory(name: str) -> Callable[..., Any]:
    """The function that builds the named model."""
    if ":" in name:
        return _imported(name)
    if name in OWN:
        return OWN[name]
    from torchvision import models

    known = models.list_models(module=models)
    if name in known:
        return models.get_model_builder(name)
    near = difflib.get_close_matches(name, [*OWN, *known], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"unknown model {name!r}{hint}; expected one of {', '.join(OWN)}, a torchvision "
        "classification model, or package.module:function"
    )


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the module is run, and may raise anything
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"model {name!r} cannot be imported: {said}; expected package.module:function "
            "on the Python path"
        ) from error
    if not callable(factory):
        raise ConfigError(f"model {name!r} is not callable; expected a function")
    return factory


def accepted(factory: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """The offered arguments that the factory takes: num_classes also through **kwargs (every
    torchvision model), image_size only where it is named."""
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {
        key: value
        for key, value in offered.items()
        if value is not None and (key in parameters or (takes_any and key == "num_classes"))
    }
