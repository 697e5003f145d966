"""Image folders and Hugging Face's data sets into Parquet, which streams and lives in object
storage."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from .folders import IMAGE_SUFFIXES, TEST_FOLDERS
from .parquet import ROWS, checked_names
from .source import Stored, require_text
from .storage import files_below, open_filesystem, patiently, reading, writing

log = logging.getLogger(__name__)

#: Called with the number of images written so far and of all.
OnProgress = Callable[[int, int], None]

_ROWS_PER_GROUP = 256
_GROUPS_PER_FILE = 16
#: Image files that are asked for together, where each costs the way to an object store and back.
_AT_ONCE = 64
_SPLITS: tuple[Stored, ...] = ("train", "test")
_TEST = (*TEST_FOLDERS, "validation")


class _Images(Protocol):
    """A data set to convert."""

    class_names: Sequence[str]
    rows: Mapping[Stored, int]

    def read(self, split: Stored) -> Iterator[tuple[bytes | None, int]]:
        """Encoded images and labels of a split; None for a file that cannot be read."""
        ...


def folder_to_parquet(
    folder: str, uri: str, on_progress: OnProgress = lambda done, total: None
) -> dict[str, int]:
    """Write `train/` and `test/` part files from a folder in torchvision's ImageFolder layout.

    The image files are stored as they are, in a random order that is always the same, 256 in a
    row group and 4,096 in a file.

    Args:
        folder: folder or fsspec URI with train/CLASS/ and test/CLASS/ or val/CLASS/.
        uri: new or empty folder, or fsspec URI, for the result: the `data.uri` of a recipe.
        on_progress: is told how many images are done.

    Returns:
        Number of images written of each split.

    Raises:
        DataError: the folder cannot be used or read, or the target holds something already.
        StorageError: the target cannot be written.
    """
    return _write(_Folder(folder), uri, on_progress)


def dataset_to_parquet(
    dataset: Any, uri: str, on_progress: OnProgress = lambda done, total: None
) -> dict[str, int]:
    """Write `train/` and `test/` part files from a `datasets.DatasetDict` of Hugging Face.

    Args:
        dataset: with a "train" split, a "test", "val" or "validation" split, and in both an
            image column ("image" or "img") and a label column ("label" or "fine_label"). Images
            keep the bytes that they are stored as; those to train on come in a random order.
        uri, on_progress, result and errors: as for `folder_to_parquet`. A format or transform
            of the data set is left out; labels that are ids, negative or beyond the classes are a
            DataError too.
    """
    return _write(_Dataset(dataset), uri, on_progress)


def is_saved_dataset(uri: str) -> bool:
    """Whether a folder is what `DatasetDict.save_to_disk` wrote."""
    filesystem, root = open_filesystem(uri)
    with reading(uri):
        try:  # not `exists`, to which storage that is away has no such file
            patiently(filesystem, root, partial(filesystem.info, f"{root}/dataset_dict.json"))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


class _Folder:
    def __init__(self, uri: str) -> None:
        self._filesystem, root = open_filesystem(uri)
        self._filesystem.invalidate_cache()  # what was written since the last listing counts
        with reading(uri):
            ask = partial(self._filesystem.ls, root, detail=False)
            try:  # not `isdir`, to which storage that is away is no folder
                entries = patiently(self._filesystem, root, ask)
            except (FileNotFoundError, NotADirectoryError):
                entries = [root]
            if [path.strip("/") for path in entries] == [root.strip("/")]:  # itself: a file
                raise DataError(f"{uri} is not a folder; expected train and test or val in it")
            found = {PurePosixPath(path).name for path in entries}
            test = next((name for name in TEST_FOLDERS if name in found), None)
            if test is None or "train" not in found:
                raise DataError(
                    f"{uri} lacks a split (it holds {', '.join(sorted(found)[:8]) or 'nothing'}); "
                    "expected the folders train, and test or val, each with one folder for each "
                    "class"
                )
            inside = f"{root}/" if root else ""  # of an archive
            listed: dict[Stored, list[tuple[str, str]]] = {
                "train": self._listed(f"{inside}train"),
                "test": self._listed(f"{inside}{test}"),
            }
        classes = {split: sorted({name for name, _ in files}) for split, files in listed.items()}
        if not classes["train"] or classes["train"] != classes["test"]:
            odd = sorted(set(classes["train"]) ^ set(classes["test"]))[:5]
            raise DataError(
                f"train and {test} of {uri} differ in classes ({', '.join(odd) or 'none found'}); "
                "expected the same folders of images in both"
            )
        self.class_names: Sequence[str] = classes["train"]
        require_text(self.class_names)
        self.rows: Mapping[Stored, int] = {split: len(files) for split, files in listed.items()}
        self._files = listed

    def _listed(self, folder: str) -> list[tuple[str, str]]:
        """(class, path) of every image below a split, sorted."""
        depth = len(PurePosixPath(folder).parts)
        ask = partial(files_below, self._filesystem, folder)
        return sorted(
            (path.parts[depth], name)  # the name as it is: a key may hold "//"
            for name in patiently(self._filesystem, folder, ask)
            if len((path := PurePosixPath(name)).parts) > depth + 1
            and path.suffix.lower() in IMAGE_SUFFIXES
        )

    def read(self, split: Stored) -> Iterator[tuple[bytes | None, int]]:
        """In a random order, so that the first rows hold images of every class."""
        files, labels = self._files[split], {n: i for i, n in enumerate(self.class_names)}
        order = np.random.default_rng(0).permutation(len(files))
        for start in range(0, len(order), _AT_ONCE):
            some = [files[row] for row in order[start : start + _AT_ONCE]]
            # the one call of fsspec for several files that takes no name for a pattern
            found = self._filesystem.cat_ranges([path for _, path in some], None, None)
            for (name, path), data in zip(some, found, strict=True):
                if isinstance(data, BaseException):
                    data = _contents(self._filesystem, path)
                yield data, labels[name]


class _Dataset:
    def __init__(self, dataset: Any) -> None:
        import datasets

        mapped = isinstance(dataset, Mapping)
        if not mapped or not all(hasattr(split, "__len__") for split in dataset.values()):
            raise DataError(
                f"the data set is of type {type(dataset).__name__}; expected a DatasetDict, whose "
                "splits are known; load it without split= and streaming="
            )
        tests = [name for name in _TEST if name in dataset]
        if not tests or "train" not in dataset:
            raise DataError(
                f"the data set has the splits {', '.join(dataset) or 'none'}; expected train, and "
                "test or validation"
            )
        # rows as they are stored: a format or a transform makes anything of them
        dataset = {name: rows.with_format(None) for name, rows in dataset.items()}
        features = dataset["train"].features
        image = next((name for name in ("image", "img") if name in features), None)
        label = next((name for name in ("label", "fine_label") if name in features), None)
        if image is None or label is None:
            raise DataError(
                f"the data set has the columns {', '.join(features)}; expected an image (image or "
                "img) and a label (label or fine_label)"
            )
        for split in ("train", *tests):
            kind = dataset[split].features.get(label)
            stored = str(getattr(kind, "dtype", ""))
            if hasattr(kind, "names") or "int" in stored:
                continue
            if split != "train" and (kind is None or stored == "null"):
                continue  # it holds its labels back
            raise DataError(
                f"the column {label} of {split} holds {kind}; expected a ClassLabel or whole "
                f"numbers; class_encode_column({label!r}) turns names into a ClassLabel"
            )
        # who sets a challenge keeps the labels of the test split back, and has -1 for them
        test = next((name for name in tests if _has_labels(dataset[name], label)), None)
        if test is None:
            raise DataError(
                f"the data set has no labels in {' or '.join(tests)}; expected some, from 0 on; "
                "add a validation split"
            )
        if image not in dataset[test].features:
            raise DataError(
                f"{test} has the columns {', '.join(dataset[test].features)}; expected {image} and "
                f"{label} as in train; rename the columns"
            )
        self._columns = image, label
        try:
            self._splits: dict[Stored, Any] = {
                split: dataset[name]
                .select_columns([image, label])
                .cast_column(image, datasets.Image(decode=False))
                for split, name in zip(_SPLITS, ("train", test), strict=True)
            }
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise DataError(
                f"the column {image} holds {str(features[image])[:80]} "
                f"({' '.join(str(error).split())[:160]}); expected one image a row; cast it to "
                "datasets.Image()"
            ) from error
        self.rows: Mapping[Stored, int] = {s: len(rows) for s, rows in self._splits.items()}
        names = getattr(features[label], "names", None)
        others = getattr(dataset[test].features[label], "names", None)
        if others != names:
            raise DataError(
                f"the classes of train are {str(names)[:80]} and those of {test} "
                f"{str(others)[:80]}; expected the same in the same order; cast one to the other's"
            )
        ranges = {split: _label_range(rows, label) for split, rows in self._splits.items()}
        self.class_names: Sequence[str] = checked_names(
            names, ranges, self.rows["train"], "the data set", "a ClassLabel"
        )

    def read(self, split: Stored) -> Iterator[tuple[bytes | None, int]]:
        """Those to train on in a random order: where they are sorted by class, a stream would mix
        few of the classes."""
        image, label = self._columns
        rows = self._splits[split]
        for row in rows.shuffle(seed=0, keep_in_memory=True) if split == "train" else rows:
            found = row[image] or {"bytes": None, "path": None}
            data = found["bytes"]
            if data is None and found["path"]:
                data = _contents(*open_filesystem(found["path"]))
            yield data, row[label]


def _contents(filesystem: Any, path: str) -> bytes | None:
    """None for a file that is not there for us, which counts as corrupt where the set is read."""
    with reading(path):
        try:
            return bytes(patiently(filesystem, path, partial(filesystem.cat_file, path)))
        except (FileNotFoundError, PermissionError):
            return None


def _write(images: _Images, uri: str, on_progress: OnProgress) -> dict[str, int]:
    filesystem, root = open_filesystem(uri, written=True)
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", "int64")],
        metadata={
            "class_names": json.dumps(list(images.class_names)),
            ROWS: json.dumps(dict(images.rows)),
        },
    )
    done, total, begun = 0, sum(images.rows.values()), list[str]()
    unread = 0
    with writing(uri), contextlib.ExitStack() as failed:
        if filesystem.exists(root) and any(
            not path.endswith("/") for path in filesystem.find(root)
        ):
            raise DataError(
                f"{uri} holds files already; expected an empty folder; choose another, or delete "
                "what a conversion that was cut off has left"
            )
        failed.callback(_delete, filesystem, begun)
        for split, count in images.rows.items():
            filesystem.makedirs(f"{root}/{split}", exist_ok=True)
            rows = images.read(split)
            for number in range(-(-count // (_ROWS_PER_GROUP * _GROUPS_PER_FILE))):
                path = f"{root}/{split}/part-{number:05}.parquet"
                begun.append(path)
                with (
                    filesystem.open(path, "wb") as handle,
                    pq.ParquetWriter(handle, schema, compression="zstd") as writer,
                ):
                    for _ in range(_GROUPS_PER_FILE):
                        group = [row for _, row in zip(range(_ROWS_PER_GROUP), rows, strict=False)]
                        if not group:
                            break
                        writer.write_table(pa.Table.from_pylist(
                            [{"image": {"bytes": data}, "label": label} for data, label in group],
                            schema=schema,
                        ))  # fmt: skip
                        done += len(group)
                        unread += sum(data is None for data, _ in group)
                        on_progress(done, total)
        failed.pop_all()
    if unread:
        log.warning("%d of %d images could not be read; they will count as corrupt", unread, total)
    return {str(split): count for split, count in images.rows.items()}


def _delete(filesystem: Any, paths: Sequence[str]) -> None:
    """What was begun, so that nobody takes it for a data set and the conversion can begin anew."""
    for path in paths:
        try:
            if filesystem.exists(path):
                filesystem.rm_file(path)
        except Exception as error:  # the storage may be what failed
            log.warning("%s could not be deleted (%s); delete it by hand", path, error)


def _has_labels(rows: Any, label: str) -> bool:
    """Whether any row has a label; an empty split is refused later, in its own words."""
    return label in rows.features and (
        not len(rows) or any(value is not None and value >= 0 for value in rows[label])
    )


def _label_range(rows: Any, label: str) -> tuple[int, int]:
    """Smallest and largest label, where a missing one is -1 as in `ParquetSource`."""
    # alone, for what is selected or shuffled is written out first
    found = rows.select_columns(label).unique(label)
    labels = [-1 if value is None else value for value in found]
    return min(labels, default=0), max(labels, default=-1)
