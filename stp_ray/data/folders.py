"""torchvision's own data sets: CIFAR-10 and CIFAR-100 as downloaded, and folders of images."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchvision import datasets

from ..errors import DataError
from ..uris import local_path
from .decode import image_shape
from .source import ArraySource, Chunk, Layout, Stored, fingerprint
from .storage import reading

#: The folder beside "train", by the first of these names that is there.
TEST_FOLDERS = ("test", "val")
#: Files that torchvision's ImageFolder takes for images.
IMAGE_SUFFIXES = frozenset(datasets.folder.IMG_EXTENSIONS)

_PART_FILES = 256
#: So many files of a split, from all over it, are asked for their sizes: each is a question to the
#: disk, and a split may hold a million.
_SIZED = 1024


def local_folder(name: str, uri: str | None) -> Path:
    """The folder of a torchvision set.

    Raises:
        DataError: it is not given, not local, not there or may not be read.
    """
    if uri is None:
        raise DataError(
            f"data.name {name} has no data.uri; expected a folder; set data.uri, or --root of "
            "`stp data describe`"
        )
    path = local_path(uri)
    if path is None:
        raise DataError(
            f"data.uri {uri} is not a local folder; expected one for {name}, which torchvision "
            "reads; copy the data or convert it to Parquet"
        )
    folder = Path(path)
    with reading(str(folder)):
        if not folder.is_dir():
            raise DataError(
                f"data.uri {folder} is not a folder; expected the folder of {name}; change data.uri"
            )
    return folder


def cifar(name: str, uri: str | None) -> ArraySource:
    """CIFAR-10 or CIFAR-100 in the files of their authors (Krizhevsky, 2009), 32x32 pixels.

    torchvision compares each file with a checksum of its own before it reads it.

    Raises:
        DataError: the files are not there or are damaged.
    """
    folder = local_folder(name, uri)
    kind = {"CIFAR10": datasets.CIFAR10, "CIFAR100": datasets.CIFAR100}[name]
    try:
        splits = [kind(str(folder), train=train) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{name} is not complete in {folder}; expected the unpacked folder {kind.base_folder}; "
            f"fetch it with torchvision.datasets.{name}(folder, download=True), or change data.uri"
        ) from error
    train, test = (
        (
            np.ascontiguousarray(np.asarray(split.data, dtype=np.uint8).transpose(0, 3, 1, 2)),
            np.asarray(split.targets, dtype=np.int64),
        )
        for split in splits
    )
    return ArraySource(splits[0].classes, train, test)


@dataclass(frozen=True)
class FolderPart:
    """Rows of a split that are read together."""

    split: Stored
    rows: NDArray[np.int64]


class FolderSource:
    """Image files in `train/CLASS/` and `test/CLASS/` or `val/CLASS/`.

    Files are taken in a random order that is always the same, so that the first rows hold
    images of every class.
    """

    def __init__(self, uri: str | None) -> None:
        """List the files.

        Raises:
            DataError: a folder is missing, empty or unreadable, or the two splits differ in
                classes.
        """
        folder = local_folder("ImageFolder", uri)
        self._folder = folder
        with reading(str(folder)):
            test = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
            if test is None or not (folder / "train").is_dir():
                found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
                raise DataError(
                    f"{folder} lacks a split (it holds {found}); expected the folders train, and "
                    "test or val, each with one folder for each class; change data.uri"
                )
            listed = {"train": _listed(folder / "train"), "test": _listed(test)}
        self._classes = tuple(listed["train"].classes)
        if tuple(listed["test"].classes) != self._classes:
            different = sorted(set(listed["test"].classes) ^ set(self._classes))
            raise DataError(
                f"{test} and {folder / 'train'} differ in classes ({', '.join(different[:5])}); "
                "expected the same folders in both; change data.uri"
            )
        self._samples = {
            split: [
                listing.samples[i]
                for i in np.random.default_rng(0).permutation(len(listing.samples))
            ]
            for split, listing in listed.items()
        }

    def layout(self) -> Layout:
        """Sizes and names, and the shape of the first readable image."""
        for path, _ in self._samples["train"][:16]:
            shape = image_shape(_file(path))
            if shape is not None:
                train, test = len(self._samples["train"]), len(self._samples["test"])
                files = {
                    split: [
                        (path.removeprefix(str(self._folder)), _size(path) if i < _SIZED else None)
                        for i, (path, _) in enumerate(samples)
                    ]
                    for split, samples in self._samples.items()
                }
                return Layout(self._classes, train, test, shape, fingerprint(files, shape))
        raise DataError(
            f"16 images of {self._folder / 'train'} cannot be decoded; expected image files such "
            "as JPEG or PNG; change data.uri"
        )

    def parts(self, split: Stored, rows: NDArray[np.int64]) -> list[FolderPart]:
        """The rows in pieces of 256 files."""
        starts = range(0, len(rows), _PART_FILES)
        return [FolderPart(split, rows[start : start + _PART_FILES]) for start in starts]

    def read(self, part: FolderPart) -> Iterator[Chunk]:
        """One chunk; a file that cannot be opened counts as corrupt."""
        samples = [self._samples[part.split][row] for row in part.rows]
        labels = np.array([label for _, label in samples], dtype=np.int64)
        yield Chunk(part.rows, [_file(path) for path, _ in samples], labels)


def _size(path: str) -> int | None:
    with reading(path):
        try:
            return os.stat(path).st_size
        except FileNotFoundError:  # which counts as corrupt where it is read
            return None


def _listed(folder: Path) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(str(folder))
    except (FileNotFoundError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"{folder} cannot be used ({reason}); expected one folder with images for each "
            "class; change data.uri"
        ) from error


def _file(path: str) -> bytes | None:
    """None where there is no such file for us, which counts as corrupt. A disk that does not answer
    is an error: on another day the image would be there, and the order of all others another."""
    with reading(path):
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, PermissionError):
            return None
