import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stp_ray.data import DataOptions, Split, eval_batches, steps_per_epoch, train_batches
from stp_ray.data.batches import Augmentation, _boxes, random_crop, random_resized_crop
from stp_ray.errors import DataError
from tests.data.samples import pixels

AUGMENTATIONS = [
    {},
    {"crop_padding": 2, "flip": True},
    {"random_resized_crop": True, "flip": True, "image_size": 14},
    {"trivial_augment": True},
    {"mixup": 0.2, "crop_padding": 1},
]


def options(**changes):
    return DataOptions(**{"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **changes})


def numbered(rows, size=16):
    """Random images whose labels are their row numbers."""
    return Split(pixels(rows, size), np.arange(rows, dtype=np.int64))


def batches(split, changes, **where):
    where = {"seed": 3, "epoch": 1, "batch_size": 8, "num_classes": len(split), **where}
    return list(train_batches(split, options(**changes), **where))


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("changes", AUGMENTATIONS)
def test_a_restart_at_any_step_gives_identical_batches(changes):
    split = numbered(35)
    whole = batches(split, changes, world_size=2, rank=1)
    assert len(whole) == 4
    assert all(images.dtype == torch.float32 for images, _ in whole)
    assert same(batches(split, changes, world_size=2, rank=1), whole)
    for first_step in range(5):
        torch.manual_seed(first_step)
        rest = batches(split, changes, world_size=2, rank=1, first_step=first_step)
        assert same(rest, whole[first_step:])


@given(
    rows=st.integers(1, 60),
    local=st.integers(1, 5),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_ranks_share_every_global_batch(rows, local, world_size, seed, epoch):
    split = numbered(rows, 2)
    batch_size = local * world_size
    where = {"seed": seed, "epoch": epoch, "batch_size": batch_size}
    if rows < batch_size:
        with pytest.raises(DataError, match="do not fill one batch"):
            batches(split, {}, **where)
        return
    alone = [labels for _, labels in batches(split, {}, **where)]
    parts = [batches(split, {}, rank=r, world_size=world_size, **where) for r in range(world_size)]
    assert len(alone) == rows // batch_size
    for step, whole in enumerate(alone):
        shares = [part[step][1] for part in parts]
        assert all(len(share) == local for share in shares)
        # The assignment is that of one worker, cut in pieces: disjoint, and nothing is left out.
        assert torch.equal(torch.cat(shares), whole)
    seen = torch.cat(alone)
    assert len(seen.unique()) == len(seen)


def test_the_order_depends_on_seed_and_epoch():
    split = numbered(64, 2)
    orders = {
        tuple(torch.cat([y for _, y in batches(split, {}, seed=seed, epoch=epoch)]).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    assert len(set(map(frozenset, orders))) == 1


@pytest.mark.parametrize("changes", AUGMENTATIONS[1:])
def test_augmentation_differs_between_steps_ranks_and_epochs(changes):
    split = Split(np.repeat(pixels(1, 16), 32, axis=0), np.arange(32) % 4)
    seen = [
        images
        for rank in range(2)
        for epoch in range(2)
        for images, _ in batches(split, changes, epoch=epoch, rank=rank, world_size=2)
    ]
    different = sum(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert different >= 0.9 * len(seen) * (len(seen) - 1) / 2


@pytest.mark.parametrize("changes", AUGMENTATIONS)
def test_the_global_generator_is_left_alone(changes):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches(numbered(16), changes)
    assert torch.equal(torch.rand(3), expected)


def test_a_batch_is_normalised():
    split = numbered(8)
    statistics = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}
    ((images, labels),) = batches(split, statistics)
    expected = split.images[labels.numpy()] / 255
    for channel in range(3):
        wanted = (expected[:, channel] - statistics["mean"][channel]) / statistics["std"][channel]
        assert np.abs(images[:, channel].numpy() - wanted).max() < 1e-6


def test_evaluation_sees_every_row_in_order_unchanged():
    split = numbered(21)
    split.images.flags.writeable = split.labels.flags.writeable = False
    changes = {"crop_padding": 4, "flip": True, "trivial_augment": True, "mixup": 1.0}
    pairs = list(eval_batches(split, options(**changes), 8))
    assert [len(labels) for _, labels in pairs] == [8, 8, 5]
    assert torch.equal(torch.cat([labels for _, labels in pairs]), torch.arange(21))
    images = torch.cat([images for images, _ in pairs])
    assert np.abs(images.numpy() - split.images / 255).max() < 1e-6
    # Training only reads the arrays too.
    batches(split, changes)


def test_evaluation_takes_the_centre_of_larger_images():
    split = numbered(3)
    ((images, _),) = eval_batches(split, options(image_size=14, random_resized_crop=True), 4)
    assert np.abs(images.numpy() - split.images[:, :, 1:15, 1:15] / 255).max() < 1e-6


@pytest.mark.parametrize("world_size", [3, 5])
def test_a_batch_that_cannot_be_divided_is_refused(world_size):
    with pytest.raises(DataError, match=f"batch_size is 8 for {world_size} workers; expected a mu"):
        batches(numbered(16), {}, world_size=world_size)


def test_a_mistake_is_raised_by_the_call():
    with pytest.raises(DataError, match=r"^7 training images do not fill one batch of 8; expected"):
        train_batches(numbered(7), options(), seed=0, epoch=0, batch_size=8, num_classes=7)
    assert steps_per_epoch(8, 8) == 1


def test_each_image_is_cropped_at_its_own_place():
    images = torch.from_numpy(pixels(64, 6))
    cropped = random_crop(images, 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, [2] * 4)
    places = set()
    for image, result in zip(padded, cropped, strict=True):
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(image[:, y : y + 6, x : x + 6], result)
        ]
        assert found
        places.add(found[0])
    assert len(places) > 15


def test_half_of_the_images_are_mirrored():
    images = torch.from_numpy(pixels(200, 6))
    augment = Augmentation(options(flip=True), 6, 2)
    flipped, _ = augment(images, torch.zeros(200, dtype=torch.int64), seed=0)
    plain = images / 255
    unchanged = (flipped - plain).flatten(1).abs().amax(1) < 1e-6
    mirrored = (flipped - plain.flip(-1)).flatten(1).abs().amax(1) < 1e-6
    assert (unchanged ^ mirrored).all()
    assert 70 < int(mirrored.sum()) < 130


def test_resized_crops_show_their_part_of_a_gradient():
    # A horizontal ramp: a crop of it is a ramp over a part of the values, alike in each row.
    ramp = (torch.arange(64) * 4).to(torch.uint8).expand(200, 3, 64, 64).contiguous()
    crops = random_resized_crop(ramp, 56, torch.Generator().manual_seed(0)).float()
    assert crops.shape == (200, 3, 56, 56)
    assert (crops - crops[:, :1, :1]).abs().max() <= 1
    assert (crops.diff(dim=-1) >= 0).all()
    widths = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) / 252
    # An area of 8 % to 100 % at ratios of 3/4 to 4/3: widths of about 0.25 to 1, 0.7 on average.
    assert 0.2 < widths.min() < 0.4
    assert widths.max() > 0.95
    assert 0.6 < widths.mean() < 0.8


def test_a_resized_crop_agrees_with_torchvision():
    from torchvision.transforms.v2 import functional

    from stp_ray.data.batches import _boxes

    random = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = functional.resize(random, [64, 64]).mul(255).to(torch.uint8)
    crops = random_resized_crop(images, 56, torch.Generator().manual_seed(5))
    boxes = _boxes(20, 64, 64, torch.Generator().manual_seed(5)).int().tolist()
    for image, crop, box in zip(images, crops, boxes, strict=True):
        expected = functional.resized_crop(image, *box, size=[56, 56], antialias=False)
        inner = (crop.int() - expected.int())[:, 3:-3, 3:-3]
        assert inner.abs().max() <= 2


def test_mixup_makes_soft_labels():
    split = Split(pixels(16), np.arange(16) % 4)
    for images, labels in batches(split, {"mixup": 1.0}, num_classes=4):
        assert images.shape == (8, 3, 8, 8)
        assert labels.shape == (8, 4)
        assert torch.allclose(labels.sum(1), torch.ones(8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("changes", [c for c in AUGMENTATIONS if "trivial_augment" not in c])
def test_a_gpu_augments_as_the_cpu_does(changes):
    split = numbered(16)
    for cpu, gpu in zip(
        batches(split, changes), batches(split, changes, device="cuda"), strict=True
    ):
        assert gpu[0].is_cuda and gpu[1].is_cuda
        # Sampling may round a pixel's value the other way.
        assert (gpu[0].cpu() - cpu[0]).abs().max() <= 2 / 255
        assert torch.allclose(gpu[1].cpu(), cpu[1])


def test_random_boxes_lie_anywhere_in_the_image():
    top, left, high, wide = _boxes(4000, 64, 48, torch.Generator().manual_seed(0)).T
    for start, extent, size in ((top, high, 64), (left, wide, 48)):
        assert start.min() >= 0
        assert (start + extent).max() == size
        free = size - extent
        places = start[free > 0] / free[free > 0]
        assert 0.45 < places.mean() < 0.55
        assert places.std() > 0.25


@pytest.mark.parametrize(("alpha", "sure"), [(0.01, True), (10.0, False)])
def test_mixup_mixes_as_much_as_it_is_told(alpha, sure):
    images, labels = torch.from_numpy(pixels(8)), torch.arange(8) % 4
    augment = Augmentation(options(mixup=alpha), 8, 4)
    soft = torch.stack([augment(images, labels, seed=seed)[1] for seed in range(40)])
    assert ((soft.amax(2) > 0.99).float().mean() > 0.9) == sure
