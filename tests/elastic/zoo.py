"""Classifiers of others, each at an input that keeps its whole depth and little of its cost."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchvision import models
from torchvision.models.maxvit import MaxVit

Builder = Callable[[], nn.Module]

#: torchvision's classifiers by the beginning of their names: the pixels to which their images are
#: reduced. Where a name has several beginnings in the table, the longest one counts.
FAMILIES = {
    "alexnet": 64,
    "convnext": 32,
    "densenet": 32,
    "efficientnet_b": 64,
    "efficientnet_v2": 64,
    "googlenet": 64,
    "inception": 96,
    "maxvit": 64,
    "mnasnet": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3": 64,
    "regnet_x": 32,
    "regnet_y": 32,
    "resnet": 32,
    "resnext": 32,
    "shufflenet_v2": 64,
    "squeezenet": 64,
    "swin": 64,
    "swin_v2": 64,
    "vgg": 32,
    "vit": 64,
    "vit_h": 56,
    "wide_resnet": 32,
}

#: One or two of each family, the smallest, for a check at their own image size.
FULL_SIZE = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
    "wide_resnet50_2",
]


def torchvision_names() -> list[str]:
    """Every classifier that torchvision has registered."""
    return models.list_models(module=models)


def own_size(name: str) -> int:
    """The image size that torchvision's weights of a classifier are for."""
    crop = models.get_model_weights(name).DEFAULT.transforms.keywords["crop_size"]
    return crop[0] if isinstance(crop, list) else crop


def family(name: str) -> str:
    """The entry of a classifier of torchvision in the table."""
    return max((start for start in FAMILIES if name.startswith(start)), key=len)


def torchvision_model(name: str, size: int, num_classes: int = 10) -> nn.Module:
    """A classifier of torchvision with random weights, for images of `size` pixels."""
    own = size == own_size(name)
    options: dict[str, object] = {}
    if name.startswith("vit"):
        options = {"image_size": size}
    elif name == "googlenet":
        options = {"init_weights": False}
    elif name == "inception_v3":
        # Its auxiliary head needs more pixels than there are in a reduced image.
        options = {"init_weights": False, "aux_logits": own}
    elif name == "maxvit_t" and not own:
        # Its windows of 7 pixels fit no smaller image; all else is as in maxvit_t.
        widths, depths = [64, 128, 256, 512], [2, 2, 5, 2]
        return MaxVit((size, size), 64, 2, widths, depths, 32, 0.2, num_classes=num_classes)
    return models.get_model(name, num_classes=num_classes, **options)


def _timm(name: str, **options: object) -> Builder:
    import timm

    return partial(timm.create_model, name, num_classes=10, **options)


#: timm: name -> image size, and options where the model is built for its image size.
TIMM: dict[str, tuple[int, dict[str, object]]] = {
    "cait_xxs24_224": (64, {"img_size": 64}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "crossvit_tiny_240": (240, {}),
    "cspresnet50": (64, {}),
    "deit_tiny_patch16_224": (64, {"img_size": 64}),
    "densenet121": (32, {}),
    "dla34": (64, {}),
    "edgenext_xx_small": (64, {}),
    "efficientnet_b0": (64, {}),
    "fastvit_t8": (64, {}),
    "ghostnet_100": (64, {}),
    "gmlp_s16_224": (64, {"img_size": 64}),
    "hrnet_w18_small": (64, {}),
    "inception_v4": (96, {}),
    "lcnet_050": (64, {}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "mobilenetv3_small_100": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "mobilevit_xxs": (64, {}),
    "nfnet_f0": (64, {}),
    "pit_ti_224": (224, {}),
    "poolformer_s12": (64, {}),
    "regnety_004": (64, {}),
    "repvgg_a0": (64, {}),
    "res2net50_26w_4s": (64, {}),
    "resnest14d": (64, {}),
    "resnext50_32x4d": (64, {}),
    "rexnet_100": (64, {}),
    "seresnet50": (64, {}),
    "skresnet18": (64, {}),
    "swin_tiny_patch4_window7_224": (224, {}),
    "tinynet_e": (64, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64}),
    "xception41": (64, {}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64}),
}


def build(library: str, name: str) -> tuple[nn.Module, int]:
    """A model in float64 for reduced images, and their size."""
    torch.manual_seed(0)
    if library == "torchvision":
        size = FAMILIES[family(name)]
        return torchvision_model(name, size).double(), size
    size, options = TIMM[name]
    return _timm(name, **options)().double(), size
