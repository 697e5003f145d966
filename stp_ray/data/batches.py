"""Batches for one rank: shuffled, augmented and normalised on the device that they go to.

What a batch holds depends on (seed, epoch, step) alone, how its images are augmented on the
rank besides. So a restart at any step continues with the very same batches.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as nn_functional
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ..errors import DataError
from .options import DataOptions
from .split import Split, derive_seed

_AREA = (0.08, 1.0)
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_ATTEMPTS = 10


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Number of whole global batches, of `batch_size` each, in `rows` images; what is left over
    waits for another epoch.

    Raises:
        DataError: there is not even one.
    """
    if rows < batch_size:
        raise DataError(
            f"{rows} training images do not fill one batch of {batch_size}; expected at least as "
            "many images; lower batch_size or data.holdout"
        )
    return rows // batch_size


def local_batch_size(batch_size: int, world_size: int) -> int:
    """Images per rank and step: `batch_size` shared among `world_size` workers.

    Raises:
        DataError: the global batch cannot be divided evenly.
    """
    if batch_size % world_size:
        raise DataError(
            f"batch_size is {batch_size} for {world_size} workers; expected a multiple of "
            f"{world_size}, so that every worker counts the same; change batch_size"
        )
    return batch_size // world_size


def train_batches(
    split: Split,
    options: DataOptions,
    *,
    seed: int,
    epoch: int,
    first_step: int = 0,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    num_classes: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of every global batch of an epoch, from `first_step` on.

    Args:
        split: images in memory.
        options: normalisation and augmentation.
        seed: the run's seed.
        epoch: number of the epoch, which is shuffled on its own.
        first_step: the step of the epoch to begin with.
        batch_size: images in a global batch, over all ranks.
        rank: this rank; the ranks' shares are disjoint and together the global batch.
        world_size: number of ranks.
        device: where the batches are augmented and go to.
        num_classes: number of classes, for mixup's soft labels.

    Yields:
        Images float32 [B / world_size, 3, H, W] and labels: int64 [B / world_size], or with
        mixup float32 [B / world_size, num_classes].

    Raises:
        DataError: the split is smaller than a batch, or the batch cannot be divided evenly.
    """
    local = local_batch_size(batch_size, world_size)
    steps = steps_per_epoch(len(split), batch_size)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        order = np.random.default_rng(derive_seed("order", seed, epoch)).permutation(len(split))
        augment = Augmentation(options, split.images.shape[-1], num_classes)
        for step in range(first_step, steps):
            start = step * batch_size + rank * local
            rows = order[start : start + local]
            images, labels = to_device(split.images[rows], split.labels[rows], device)
            yield augment(images, labels, seed=augmentation_seed(seed, epoch, step, rank))

    # Not a generator itself, so that mistakes are raised by the call and not by the first step.
    return batches()


def augmentation_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Seed of the augmentation of one rank's part of one batch."""
    return derive_seed("augment", seed, epoch, step, rank)


def eval_batches(
    split: Split, options: DataOptions, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows of a split in order, normalised and not augmented.

    Args:
        split: the images.
        options: how they are normalised, and at what size.
        batch_size: images in a batch.
        device: where to.

    Yields:
        Images float32 [B, 3, H, W] and labels int64 [B]; the last batch may be smaller.
    """
    for start in range(0, len(split), batch_size):
        # A copy, for arrays from Ray's object store are read-only, which torch does not know.
        images = split.images[start : start + batch_size].copy()
        labels = split.labels[start : start + batch_size].copy()
        on_device, labels_there = to_device(images, labels, device)
        yield normalise_batch(on_device, options), labels_there


def to_device(
    images: NDArray[np.uint8], labels: NDArray[np.int64], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Move a batch: uint8 travels, a quarter of what float32 would take."""
    pair = torch.from_numpy(images), torch.from_numpy(labels)
    if torch.device(device).type == "cuda":
        pair = pair[0].pin_memory(), pair[1].pin_memory()
    return pair[0].to(device, non_blocking=True), pair[1].to(device, non_blocking=True)


def normalise(images: Tensor, options: DataOptions) -> Tensor:
    """uint8 images [..., 3, H, W] to float32, each channel less its mean, over its deviation."""
    scaled = functional.to_dtype(images, torch.float32, scale=True)
    return functional.normalize(scaled, list(options.mean), list(options.std), inplace=True)


def normalise_batch(images: Tensor, options: DataOptions) -> Tensor:
    """What a test sees of uint8 images [B, 3, H, W]: the centre at the image size, normalised."""
    size = options.image_size or images.shape[-1]
    return normalise(functional.center_crop(images, [size, size]), options)


class Augmentation:
    """Random changes to a batch, in batches.

    torchvision's v2 transforms draw once per call, which would crop all images of a batch alike.
    So crops and flips are drawn here for each image and applied to the batch at once;
    TrivialAugment goes image by image, mixup is v2's own.
    """

    def __init__(self, options: DataOptions, held_size: int, num_classes: int) -> None:
        """Prepare for images of `held_size` pixels in memory and labels 0..num_classes-1."""
        self._options = options
        self._size = options.image_size or held_size
        self._trivial = v2.TrivialAugmentWide() if options.trivial_augment else None
        self._mixup = (
            v2.MixUp(alpha=options.mixup, num_classes=num_classes) if options.mixup else None
        )

    def __call__(self, images: Tensor, labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """Augment and normalise uint8 images [B, 3, H, W] with labels int64 [B] on their device.

        Every random number comes from `seed` and is drawn on the CPU, so all devices see the
        same ones; the global generators are left as they were.
        """
        random = torch.Generator().manual_seed(seed)
        if self._options.random_resized_crop:
            images = random_resized_crop(images, self._size, random)
        elif self._options.crop_padding:
            images = random_crop(images, self._options.crop_padding, random)
        if self._options.flip:
            flipped = torch.rand(len(images), generator=random) < 0.5
            flipped = flipped.to(images.device)[:, None, None, None]
            images = torch.where(flipped, functional.horizontal_flip(images), images)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would seed CUDA's generators too.
            torch.default_generator.manual_seed(seed)
            if self._trivial is not None:
                images = torch.stack([self._trivial(image) for image in images])
            normalised = normalise(images, self._options)
            if self._mixup is not None:
                normalised, labels = self._mixup(normalised, labels)
        return normalised, labels


def random_crop(images: Tensor, padding: int, random: torch.Generator) -> Tensor:
    """Pad with black on each side, then crop each image at its own place to its old size.

    Args:
        images: uint8 [B, C, H, W].
        padding: pixels on each side.
        random: source of the places, on the CPU.
    """
    batch, _, height, width = images.shape
    padded = functional.pad(images, [padding])
    offsets = torch.randint(2 * padding + 1, (2, batch, 1), generator=random).to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    which = torch.arange(batch, device=images.device)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


def random_resized_crop(images: Tensor, size: int, random: torch.Generator) -> Tensor:
    """Crop each image to its own part of 8 % to 100 % of the area, resized to `size`.

    The distribution is that of torchvision's RandomResizedCrop. Sampling is bilinear without
    antialiasing: images are held at most 8/7 larger than `size`, so next to nothing is lost.

    Args:
        images: uint8 [B, C, H, W].
        size: height and width of the result in pixels.
        random: source of the crops, on the CPU.
    """
    boxes = _boxes(len(images), images.shape[-2], images.shape[-1], random).to(images.device)
    # Pixel centres of the result, from the left edge to the right edge of each box.
    steps = (torch.arange(size, device=images.device) + 0.5) / size
    extent = torch.tensor(images.shape[-2:], device=images.device)[None, :, None]
    places = (boxes[:, :2, None] + boxes[:, 2:, None] * steps) / extent * 2 - 1
    y, x = places[:, 0], places[:, 1]
    grid = torch.stack(
        [x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1
    )
    sampled = nn_functional.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled.round().to(torch.uint8)


def _boxes(batch: int, height: int, width: int, random: torch.Generator) -> Tensor:
    """Top, left, height and width of a crop for each image, in pixels: float32 [batch, 4]."""
    uniform = torch.rand((4, batch, _ATTEMPTS), generator=random)
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * uniform[0]) * height * width
    ratio = torch.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * uniform[1])
    high, wide = torch.round(torch.sqrt(area / ratio)), torch.round(torch.sqrt(area * ratio))
    fits = (high >= 1) & (high <= height) & (wide >= 1) & (wide <= width)
    # The first attempt that fits; if none does, the whole image.
    first = fits.int().argmax(dim=1, keepdim=True)
    none = ~fits.any(dim=1)
    high = high.gather(1, first)[:, 0].masked_fill(none, height)
    wide = wide.gather(1, first)[:, 0].masked_fill(none, width)
    top = torch.floor(uniform[2, :, 0] * (height - high + 1))
    left = torch.floor(uniform[3, :, 0] * (width - wide + 1))
    return torch.stack([top, left, high, wide], dim=1)
