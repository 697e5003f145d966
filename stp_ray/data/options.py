"""What a recipe says about its images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

__all__ = ["DataOptions"]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which images are used and how they are prepared.

    Raises:
        ValueError: a value outside its range, in one line that names the field.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    name: str = "digits"
    """Data set: "digits" (scikit-learn's 1,797 handwritten digits, no download), "parquet", or
    torchvision's "CIFAR10", "CIFAR100" or "ImageFolder"."""

    uri: str | None = None
    """Folder of the data. For "parquet" any fsspec URI that holds a training and a test split as
    `train.parquet`/`test.parquet`, as folders of part files or as `train-*.parquet` files
    (`val*` where there is no `test*`); for the torchvision sets a local folder."""

    image_size: int | None = None
    """Height and width of the images that the network sees, in pixels: the shorter side is
    resized to it and the centre kept. None: as they are stored, all of one square size."""

    holdout: int = 512
    """Number of training images that are kept out of training, for scoring candidates."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each colour channel on the scale 0..1, subtracted. Default: ImageNet's."""

    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each colour channel on the scale 0..1, divided by."""

    crop_padding: int = 0
    """Black pixels added on each side before a random crop back to the image size, at most 1,024;
    0 = no crop."""

    random_resized_crop: bool = False
    """Train on random crops of 8 % to 100 % of the area, resized to the image size. Images are
    then kept 8/7 larger, and tests see their centre [the usual ImageNet recipe]."""

    flip: bool = False
    """Mirror half of the training images, left to right."""

    trivial_augment: bool = False
    """One random operation of random strength on each training image (TrivialAugment, wide)."""

    mixup: float = 0.0
    """Parameter of the Beta distribution of mixup, 1e-6 to 1e6; 0 = off. Labels become soft."""

    max_corrupt: float = 0.01
    """Share of a split's images that may be unreadable; they are skipped and counted."""

    loading: Literal["auto", "resident", "stream"] = "auto"
    """"resident": decoded once and kept in memory; "stream": read and decoded in every epoch
    through Ray Data (Parquet only); "auto": resident where it fits `resident_limit_mb`."""

    decode: Literal["trainer", "tasks"] = "trainer"
    """Where a streamed image is decoded: by the threads of the worker that trains on it
    (`cluster.threads_per_worker`), or by the tasks that read it, on any machine with CPUs to
    spare; then ten times as many bytes travel."""

    resident_limit_mb: int = 4096
    """Largest decoded size that "auto" keeps in memory, in MiB."""

    limit: int | None = None
    """Use only the first so many training images, the held-out ones included; for trials."""

    def __post_init__(self) -> None:
        """Check every field that has a range."""
        _at_least("image_size", self.image_size, 1)
        _at_least("holdout", self.holdout, 1)
        _at_least("crop_padding", self.crop_padding, 0)
        if self.crop_padding > 1024:
            raise ValueError(
                f"crop_padding is {self.crop_padding}; expected at most 1024 pixels; change "
                "data.crop_padding"
            )
        if self.mixup != 0 and not 1e-6 <= self.mixup <= 1e6:
            raise ValueError(
                f"mixup is {self.mixup}; expected 0, or 1e-6 to 1e6; change data.mixup"
            )
        _at_least("resident_limit_mb", self.resident_limit_mb, 1)
        _at_least("limit", self.limit, 2)
        _channels("mean", self.mean)
        _channels("std", self.std)
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; expected numbers above 0; change data.std")
        if not 0 <= self.max_corrupt <= 1:
            raise ValueError(
                f"max_corrupt is {self.max_corrupt}; expected a share from 0 to 1; "
                "change data.max_corrupt"
            )
        _one_of("loading", self.loading, "auto", "resident", "stream")
        _one_of("decode", self.decode, "trainer", "tasks")
        if self.crop_padding and self.random_resized_crop:
            raise ValueError(
                f"crop_padding is {self.crop_padding} beside random_resized_crop; expected one "
                "kind of crop; set data.crop_padding to 0"
            )


def _at_least(field: str, value: float | None, least: int) -> None:
    if value is not None and not value >= least:
        raise ValueError(f"{field} is {value}; expected at least {least}; change data.{field}")


def _one_of(field: str, value: str, *expected: str) -> None:
    if value not in expected:
        *others, last = (f'"{each}"' for each in expected)
        raise ValueError(
            f'{field} is "{value}"; expected {", ".join(others)} or {last}; change data.{field}'
        )


def _channels(field: str, values: Sequence[float]) -> None:
    if len(values) != 3:
        raise ValueError(
            f"{field} has {len(values)} numbers; expected 3, for red, green and blue; "
            f"change data.{field}"
        )
