"""What a data set has to offer, and the two sets that fit in memory as arrays."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .split import stratified_rows

Stored = Literal["train", "test"]
"""The two splits that storage holds; the held-out images are a part of "train"."""


@dataclass(frozen=True)
class Layout:
    """What is known of a data set without decoding it."""

    class_names: tuple[str, ...]
    train_rows: int
    test_rows: int
    size: tuple[int, int]
    """Height and width of the first training image, in pixels."""
    fingerprint: str
    """Tells this content from another, by what can be seen without reading the images; the same
    wherever it lies."""

    def __post_init__(self) -> None:
        """Refuse names that no file of a run could hold. Raises DataError."""
        require_text(self.class_names)


def require_text(class_names: Sequence[str]) -> None:
    """Raise DataError where the name of a class is no text: a folder whose name is not UTF-8."""
    for name in class_names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the name of class {name!r} is not UTF-8; expected text, for reports and model "
                "cards name the classes; rename the folder"
            ) from error


def fingerprint(*parts: Any) -> str:
    """16 hexadecimal digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Chunk(NamedTuple):
    """A few images as they are stored."""

    rows: NDArray[np.int64]
    """Row number of each image in its split."""

    images: Sequence[bytes | None] | NDArray[np.uint8]
    """Encoded files, or decoded uint8 RGB [n, 3, H, W]."""

    labels: NDArray[np.int64]
    """Class index of each image, int64 [n]."""


class Source(Protocol):
    """A data set. `read` may be called from several threads at once."""

    def layout(self) -> Layout:
        """Sizes and names, cheaply. Raises DataError if the data cannot be used."""
        ...

    def parts(self, split: Stored, rows: NDArray[np.int64]) -> Sequence[Any]:
        """Pieces that together hold these ascending rows of a split, in their order."""
        ...

    def read(self, part: Any) -> Iterator[Chunk]:
        """The rows of one of those pieces, in order."""
        ...


@dataclass(frozen=True)
class ArrayPart:
    """Rows of an array."""

    split: Stored
    rows: NDArray[np.int64]


class ArraySource:
    """A data set that is in memory already."""

    def __init__(
        self,
        class_names: Sequence[str],
        train: tuple[NDArray[np.uint8], NDArray[np.int64]],
        test: tuple[NDArray[np.uint8], NDArray[np.int64]],
    ) -> None:
        """Take uint8 RGB images [N, 3, H, W] with int64 labels [N] of both splits."""
        self._class_names = tuple(class_names)
        self._splits = {"train": train, "test": test}

    def layout(self) -> Layout:
        """Sizes and names."""
        images = self._splits["train"][0]
        labels = [split[1].tolist() for split in self._splits.values()]
        return Layout(
            self._class_names,
            len(images),
            len(self._splits["test"][0]),
            (images.shape[2], images.shape[3]),
            fingerprint(self._class_names, images.shape, labels),
        )

    def parts(self, split: Stored, rows: NDArray[np.int64]) -> list[ArrayPart]:
        """The rows in pieces of 4,096."""
        return [ArrayPart(split, rows[i : i + 4096]) for i in range(0, len(rows), 4096)]

    def read(self, part: ArrayPart) -> Iterator[Chunk]:
        """One chunk, copied from the arrays."""
        images, labels = self._splits[part.split]
        yield Chunk(part.rows, images[part.rows], labels[part.rows])


def digits() -> ArraySource:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels: 1,437 to train on and 360 to test on.

    The grey values 0..16 become 0..255 in three equal channels. The split keeps the class
    shares and is the same for every seed.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[:, None], 3, axis=1)
    labels = data.target.astype(np.int64)
    test = stratified_rows(labels, 360, seed=0)
    train = np.setdiff1d(np.arange(len(labels)), test)
    names = [str(name) for name in data.target_names]
    return ArraySource(names, (images[train], labels[train]), (images[test], labels[test]))
