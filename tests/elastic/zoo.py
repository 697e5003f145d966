"""Classifiers of others, each at an input that keeps its whole depth and little of its cost."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchvision import models
from torchvision.models.maxvit import MaxVit

Builder = Callable[[], nn.Module]


def _torchvision(name: str, **options: object) -> Builder:
    return partial(models.get_model, name, num_classes=10, **options)


#: torchvision: one or two of each family. Builder, image size.
TORCHVISION: dict[str, tuple[Builder, int]] = {
    "alexnet": (_torchvision("alexnet"), 64),
    "convnext_tiny": (_torchvision("convnext_tiny"), 64),
    "densenet121": (_torchvision("densenet121"), 32),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), 64),
    "efficientnet_v2_s": (_torchvision("efficientnet_v2_s"), 64),
    "googlenet": (_torchvision("googlenet", init_weights=False), 64),
    "inception_v3": (
        _torchvision("inception_v3", init_weights=False, aux_logits=False),
        96,
    ),
    "maxvit_t": (
        partial(MaxVit, (64, 64), 16, 2, [16, 32], [2, 2], 8, 0.1, num_classes=10),
        64,
    ),
    "mnasnet0_5": (_torchvision("mnasnet0_5"), 64),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), 32),
    "mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), 64),
    "mobilenet_v3_large": (_torchvision("mobilenet_v3_large"), 64),
    "regnet_x_400mf": (_torchvision("regnet_x_400mf"), 32),
    "regnet_y_400mf": (_torchvision("regnet_y_400mf"), 32),
    "resnet18": (_torchvision("resnet18"), 32),
    "resnet50": (_torchvision("resnet50"), 32),
    "resnext50_32x4d": (_torchvision("resnext50_32x4d"), 32),
    "shufflenet_v2_x0_5": (_torchvision("shufflenet_v2_x0_5"), 64),
    "shufflenet_v2_x1_0": (_torchvision("shufflenet_v2_x1_0"), 64),
    "squeezenet1_0": (_torchvision("squeezenet1_0"), 64),
    "squeezenet1_1": (_torchvision("squeezenet1_1"), 64),
    "swin_t": (_torchvision("swin_t"), 64),
    "swin_v2_t": (_torchvision("swin_v2_t"), 64),
    "vgg11": (_torchvision("vgg11"), 32),
    "vgg11_bn": (_torchvision("vgg11_bn"), 32),
    "vit_b_32": (_torchvision("vit_b_32", image_size=64), 64),
    "wide_resnet50_2": (_torchvision("wide_resnet50_2"), 32),
}


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
    """A model in float64, and the size of its images."""
    torch.manual_seed(0)
    if library == "torchvision":
        builder, size = TORCHVISION[name]
    else:
        size, options = TIMM[name]
        builder = _timm(name, **options)
    return builder().double(), size
