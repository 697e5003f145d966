"""What a pruned network says of every test image, beside what the dense one says."""

import io
import json
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..data import DataOptions

PREDICTIONS = "predictions.parquet"

#: Images kept of each side: those that were lost, and those that were won.
_SHOWN = 12
#: Longest side of a kept image in pixels; small ones are kept as they are.
_THUMBNAIL = 96


def compare(
    before: nn.Module,
    after: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    options: DataOptions,
    class_names: Sequence[str],
) -> pa.Table:
    """Both networks' classes of the same images.

    Args:
        before, after: classifiers in evaluation mode, images [B, 3, H, W] -> logits [B, C].
        batches: normalised images and their labels [B].
        options: the mean and deviation that the images were normalised with.
        class_names: in the order of the labels; they travel in the schema (key "class_names").

    Returns:
        A row for each image: `label`, `before`, `after` (class indices) and `image`, a small
        PNG of the first dozen that `before` alone gets right and of the first dozen that
        `after` alone does, null for all others.
    """
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (options.mean, options.std))
    rows: list[dict[str, object]] = []
    left = {True: _SHOWN, False: _SHOWN}
    with torch.no_grad():
        for images, labels in batches:
            sides = [network(images).argmax(1).tolist() for network in (before, after)]
            for image, label, one, two in zip(images, labels.tolist(), *sides, strict=True):
                png, won = None, two == label
                if (one == label) != won and left[won]:
                    left[won] -= 1
                    png = _png(image.cpu().float() * std + mean)
                rows.append({"label": label, "before": one, "after": two, "image": png})
    schema = pa.schema(
        [("label", "int32"), ("before", "int32"), ("after", "int32"), ("image", pa.binary())],
        metadata={"class_names": json.dumps(list(class_names))},
    )
    return pa.Table.from_pylist(rows, schema=schema)


def top1(said: pa.Table) -> float:
    """How often the network after is right, in per cent of the rows of `compare`."""
    hits = int(np.count_nonzero(said["after"].to_numpy() == said["label"].to_numpy()))
    return 100.0 * hits / said.num_rows  # as `evaluate` rounds it


def _png(image: Tensor) -> bytes:
    scale = _THUMBNAIL / max(image.shape[1:])
    if scale < 1:
        size = [max(1, round(scale * extent)) for extent in image.shape[1:]]
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
