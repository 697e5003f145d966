"""Decoded images in memory, and which training images are held out."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Split:
    """Decoded images and their labels, as numpy arrays.

    numpy, because Ray's object store then shares one copy between the workers of a node.
    """

    images: NDArray[np.uint8]
    """RGB images, uint8 [N, 3, H, W]."""

    labels: NDArray[np.int64]
    """Class indices, int64 [N]."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def sample(self, count: int) -> "Split":
        """`count` images from all over the split, always the same; all if there are no more.

        Unlike the first ones they are of every class even where rows are sorted by it.
        """
        if count >= len(self):
            return self
        rows = spread_rows(len(self), count)
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class ImageData:
    """A data set in memory: the images to train on, to score candidates on, and to test on."""

    train: Split
    """Images to train on."""

    holdout: Split
    """Training images kept out of training, to score candidates on."""

    test: Split
    """Images that only accuracies are measured on."""

    class_names: list[str]
    """Name of each class, in the order of the labels."""

    corrupt: int = 0
    """Number of images that could not be decoded and were left out."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part; the same on every machine."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def spread_rows(rows: int, count: int) -> NDArray[np.int64]:
    """`count` of `rows` row numbers, ascending: one random row of each of `count` equal stretches.

    So a set that is sorted by class gives images of every class. The choice depends on the two
    numbers alone: every seed of a run and every way of loading holds out the same images [ours].
    """
    edges = np.arange(count + 1, dtype=np.int64) * rows // count
    random = np.random.default_rng(derive_seed("spread", rows, count))
    return edges[:-1] + (random.random(count) * np.diff(edges)).astype(np.int64)


def stratified_rows(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Ascending row numbers of `count` images with the class shares of the whole, int64 [count]."""
    random = np.random.default_rng(derive_seed("stratified", seed))
    shuffled = random.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    edges = np.arange(count, dtype=np.int64) * len(labels) // count
    return np.sort(by_class[edges])
