"""BatchNorm statistics of a subnet, measured anew."""

from collections.abc import Iterable

from torch import Tensor

from ..elastic.subnet import Subnet
from ..elastic.supernet import Stats, StatsRecorder, Supernet
from .checks import require
from .modes import device_of, inspecting


def calibrate(net: Supernet, subnet: Subnet, batches: Iterable[Tensor]) -> Stats:
    """Cumulative averages of the batch means and variances of every BatchNorm layer [ST].

    The network's mode, weights and buffers stay as they are.

    Args:
        net: the supernet.
        subnet: whose statistics.
        batches: images [B, ...], normalised and augmented as for training.

    Returns:
        Layer name -> named tensors, for `net(x, subnet, stats=...)` and `net.extract`;
        empty if the subnet has no BatchNorm.

    Raises:
        ValueError: there is no batch, or one that is no tensor of several images.
    """
    if not isinstance(batches, Iterable):
        raise ValueError(f"the batches are {batches!r:.60}; expected a list of tensors of images")
    recorder = StatsRecorder()
    device = device_of(net)
    count = 0
    with inspecting(net):
        for count, images in enumerate(batches, start=1):
            _check(images, count)
            try:
                net(images.to(device), subnet, stats=recorder)
            except ValueError as error:
                if len(images) > 1:
                    raise
                raise ValueError(
                    f"calibration batch {count} is one image, which has no variance ({error}); "
                    "expected several in each; leave the last one out (drop_last=True)"
                ) from error
            if count == 1 and not recorder.stats():
                return {}
    require(count > 0, "the number of calibration batches", count, "at least 1", "add images")
    return recorder.stats()


def _check(images: object, place: int) -> None:
    """Refuse what a loader of images with labels, or a tensor that is taken apart, would give."""
    if not isinstance(images, Tensor):
        found, change = type(images).__name__, "leave labels out: (images for images, _ in loader)"
    elif images.dim() != 4 or not len(images):
        found, change = f"a tensor of shape {list(images.shape)}", "give a list of batches"
    else:
        return
    raise ValueError(
        f"calibration batch {place} is {found}; expected a tensor of images [B, C, H, W]; {change}"
    )
