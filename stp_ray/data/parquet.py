"""Images in Parquet files, on any storage that fsspec reaches.

The layout is the one that Hugging Face's `datasets` writes: an image column
`struct<bytes, path>` (or plain binary) and an integer label column. Class names are a JSON list
under the schema's metadata key `class_names`, or come from the `huggingface` key.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from ..errors import DataError
from ..uris import absolute, from_root
from .decode import image_shape
from .source import Chunk, Layout, Stored, fingerprint
from .storage import files_below, open_filesystem, patiently, reading

#: Rows that are read and decoded at a time, and about how many bytes of them at most.
CHUNK_ROWS = 256
_CHUNK_BYTES = 1 << 28

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")
_SPLITS: tuple[Stored, ...] = ("train", "test")
#: Where a conversion says in the schema's metadata how many images each split has.
ROWS = "stp_ray.rows"
_SPLIT_PREFIXES: dict[Stored, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}
_SPLIT_WORDS: dict[Stored, str] = {"train": "training", "test": "test"}
_FIRST_IMAGES = 16
#: Row numbers, contents of image files, and labels.
_Piece = tuple[NDArray[np.int64], pa.Array, NDArray[np.int64]]


@dataclass(frozen=True)
class Columns:
    """Where the images and the labels are."""

    image: str
    """Name of the image column."""

    encoded: str
    """Path of its encoded bytes: the column itself or a field of it."""

    label: str
    """Name of the label column."""


@dataclass(frozen=True)
class ParquetPart:
    """Rows of one row group."""

    path: str
    """Path in the filesystem of the data set."""

    group: int
    """Index of the row group in the file."""

    first: int
    """Row number in the split of the group's first row."""

    rows: NDArray[np.int64]
    """Ascending row numbers in the split of the wanted rows."""

    size: int
    """Bytes of the whole row group, uncompressed."""


@dataclass(frozen=True)
class _File:
    path: str
    first: int
    footer: pq.FileMetaData


class ParquetSource:
    """A training and a test split of Parquet files under one folder."""

    def __init__(self, uri: str) -> None:
        """Find the files and read their footers.

        Raises:
            DataError: the folder, a split or a column is missing, a file is damaged, or the folder
                lies in a tar archive.
        """
        self.uri = uri
        self._filesystem, self._root = open_filesystem(uri)
        if self._filesystem.protocol == "tar":  # all its files are read through one handle
            raise DataError(
                f"data.uri {uri} is a tar archive, which threads cannot read side by side; "
                "expected a folder or a zip archive; unpack it, or pack the files as zip"
            )
        self._filesystem.invalidate_cache()  # what was written since the last listing counts
        with reading(uri):
            folder, entries = self._entries()
            self._files: dict[Stored, list[_File]] = {}
            for split in _SPLITS:
                paths = self._split_paths(split, folder, entries)
                self._files[split] = self._footers(paths)
        first = self._files["train"] or self._files["test"]
        self.columns = _columns(first[0].footer.schema.to_arrow_schema(), uri)
        for files in self._files.values():
            for file in files:
                schema = file.footer.schema.to_arrow_schema()
                if _columns(schema, file.path) != self.columns:
                    raise DataError(
                        f"{file.path} has other columns than {first[0].path}; expected the same "
                        "in every file; change the files or data.uri"
                    )

    @property
    def full_uri(self) -> str:
        """The URI with its protocol, absolute, so that other processes find the same folder."""
        if "::" in self.uri:  # an archive, which lies in a file of its own
            return from_root(self.uri)
        return absolute(self._filesystem, self._root, self.uri)

    def layout(self) -> Layout:
        """Sizes and names from the footers, and the first image."""
        rows = {split: self._rows(split) for split in _SPLITS}
        for split in _SPLITS:
            if not rows[split]:
                raise DataError(
                    f"the {_SPLIT_WORDS[split]} split of {self.uri} has no rows; expected at "
                    "least one image; change data.uri"
                )
        with reading(self.uri):
            self._check_whole(rows)
            names = self._class_names()
            ranges = {split: self._label_range(split) for split in _SPLITS}
            named_in = '"class_names" in the schema metadata'
            names = checked_names(names, ranges, rows["train"], self.uri, named_in)
            shape = self._first_shape()
        return Layout(names, rows["train"], rows["test"], shape, self._fingerprint(names))

    def parts(self, split: Stored, rows: NDArray[np.int64]) -> list[ParquetPart]:
        """One piece for each row group that holds wanted rows."""
        found = []
        for file in self._files[split]:
            first = file.first
            for group in range(file.footer.num_row_groups):
                metadata = file.footer.row_group(group)
                begin, end = np.searchsorted(rows, (first, first + metadata.num_rows))
                if begin < end:
                    wanted = rows[begin:end]
                    found.append(
                        ParquetPart(file.path, group, first, wanted, metadata.total_byte_size)
                    )
                first += metadata.num_rows
        return found

    def read(self, part: ParquetPart) -> Iterator[Chunk]:
        """The wanted rows of a row group, some hundred at a time."""
        with reading(self.uri):
            yield from read_part(self._filesystem, part, self.columns)

    def _entries(self) -> tuple[str, dict[str, bool]]:
        """The folder that holds the splits, and its entries: name -> is a folder."""
        try:
            listed = self._listed(self._root)
        except (FileNotFoundError, NotADirectoryError):
            listed = None
        only = listed[0] if listed is not None and len(listed) == 1 else None
        itself = only is not None and _same(only["name"], self._root)
        if only is not None and itself and only["type"] == "directory":
            raise DataError(
                f"data.uri {self.uri} holds objects whose keys begin with {self._root}//; expected "
                "one slash, for a folder without a name cannot be opened; copy the objects to keys "
                "without //"
            )
        if listed is None or itself:
            found = "does not exist" if listed is None else "is a file"
            raise DataError(
                f"data.uri {self.uri} {found}; expected a folder with train.parquet and "
                "test.parquet, or train/ and test/ folders of .parquet files; change data.uri"
            )
        entries = {_name(entry["name"]): self._is_folder(entry) for entry in listed}
        if entries.get("data") and not any(name.startswith("train") for name in entries):
            folder = f"{self._root.rstrip('/')}/data"
            listed = self._listed(folder)
            return folder, {_name(entry["name"]): self._is_folder(entry) for entry in listed}
        return self._root.rstrip("/"), entries

    def _listed(self, folder: str) -> list[Any]:
        ask = partial(self._filesystem.ls, folder, detail=True)
        return list(patiently(self._filesystem, folder, ask))

    def _is_folder(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry of a listing is a folder, or a link to one."""
        linked = isinstance(self._filesystem, LocalFileSystem) and os.path.isdir(entry["name"])
        return bool(entry["type"] == "directory" or linked)

    def _split_paths(self, split: Stored, folder: str, entries: dict[str, bool]) -> list[str]:
        for prefix in _SPLIT_PREFIXES[split]:
            names = _matching(prefix, entries)
            if names:
                break
        else:
            found = ", ".join(sorted(entries)[:8]) or "nothing"
            expected = " or ".join(f"{prefix}.parquet" for prefix in _SPLIT_PREFIXES[split])
            raise DataError(
                f"{self.uri} has no {_SPLIT_WORDS[split]} split (it holds {found}); expected "
                f"{expected}, or a folder of .parquet files of that name; change data.uri"
            )
        paths: list[str] = []
        for name in names:
            path = f"{folder}/{name}"
            if entries[name]:
                ask = partial(files_below, self._filesystem, path)
                inside = patiently(self._filesystem, path, ask)
                paths += [
                    found
                    for found in sorted(inside)
                    if found.endswith(".parquet")
                    and not _hidden(found.strip("/").removeprefix(path.strip("/")))
                ]
            else:
                paths.append(path)
        if not paths:
            raise DataError(
                f"the {_SPLIT_WORDS[split]} split {names[0]} of {self.uri} holds no .parquet "
                "files; expected some; change data.uri, or read folders of images with "
                "data.name=ImageFolder"
            )
        if not isinstance(self._filesystem, LocalFileSystem):
            return paths
        once: dict[str, str] = {}
        for path in paths:  # links may lead to a folder again
            folder, name = os.path.split(path)
            once.setdefault(os.path.join(os.path.realpath(folder), name), path)
        return list(once.values())

    def _footers(self, paths: list[str]) -> list[_File]:
        def ask(path: str) -> pq.FileMetaData:
            with _open(self._filesystem, path) as handle:
                return pq.read_metadata(handle)

        failed: list[DataError] = []

        def footer(path: str) -> pq.FileMetaData:
            if failed:  # or the next files would be waited for after the first
                raise failed[0]
            try:
                with reading(path):
                    return patiently(self._filesystem, path, partial(ask, path))
            except DataError as error:
                failed.append(error)
                raise

        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(footer, paths))
        firsts = np.cumsum([0, *(footer.num_rows for footer in footers)])
        return [
            _File(path, int(first), footer)
            for path, first, footer in zip(paths, firsts, footers, strict=False)
        ]

    def _fingerprint(self, names: tuple[str, ...]) -> str:
        """Of the names of the classes, and of each row group the rows and the sizes of columns."""
        groups = [
            (split, group.num_rows, [group.column(i).total_compressed_size for i in range(columns)])
            for split in _SPLITS
            for file in self._files[split]
            for group in map(file.footer.row_group, range(file.footer.num_row_groups))
            if (columns := group.num_columns)
        ]
        return fingerprint(names, groups)

    def _rows(self, split: Stored) -> int:
        return sum(file.footer.num_rows for file in self._files[split])

    def _check_whole(self, rows: Mapping[Stored, int]) -> None:
        """Refuse what a conversion that was cut off has left."""
        metadata = self._files["train"][0].footer.metadata or {}
        wanted = json.loads(metadata.get(ROWS.encode(), b"null"))
        if wanted is not None and wanted != dict(rows):
            raise DataError(
                f"{self.uri} holds {rows['train']} training and {rows['test']} test images; "
                f"expected {wanted['train']} and {wanted['test']}: its conversion was cut off, or "
                "files were changed since; empty the folder and convert again, or, if they are to "
                f"be as they are, leave {ROWS} out of their schema metadata"
            )

    def _class_names(self) -> tuple[str, ...] | None:
        """The names that the files tell, all of them the same."""
        found: dict[tuple[str, ...], str] = {}
        for file in (file for split in _SPLITS for file in self._files[split]):
            if (names := self._names_in(file)) is not None:
                found.setdefault(names, file.path)
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise DataError(
                f"{first} has the classes {str(one)[:80]} and {second} {str(other)[:80]}; expected "
                "the same in every file; write the files again"
            )
        return next(iter(found), None)

    def _names_in(self, file: _File) -> tuple[str, ...] | None:
        metadata = file.footer.metadata or {}
        try:
            if b"class_names" in metadata:
                names = json.loads(metadata[b"class_names"])
            elif b"huggingface" in metadata:
                features = json.loads(metadata[b"huggingface"])["info"]["features"]
                names = features[self.columns.label].get("names")
            else:
                return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"the class names in the schema metadata of {self.uri} cannot be read ({error!r}); "
                'expected a JSON list of names under "class_names"; write the files again'
            ) from error
        if names is None:
            return None
        if not isinstance(names, list) or not names:
            raise DataError(
                f"the class names in the schema metadata of {self.uri} are not a list of names; "
                'expected a JSON list under "class_names"; write the files again'
            )
        return tuple(str(name) for name in names)

    def _label_range(self, split: Stored) -> tuple[int, int]:
        """Smallest and largest label: from the footers' statistics, else from the column."""
        lows, highs = [], []
        for file in self._files[split]:
            statistics = _label_statistics(file.footer, self.columns.label)
            if statistics is None:
                ask = partial(self._labels_in, file.path)
                labels = patiently(self._filesystem, file.path, ask)
                if len(labels):
                    statistics = [(int(labels.min()), int(labels.max()))]
            for low, high in statistics or []:
                lows.append(low)
                highs.append(high)
        return (min(lows), max(highs))

    def _labels_in(self, path: str) -> NDArray[np.int64]:
        with _open(self._filesystem, path) as handle:
            table = pq.ParquetFile(handle).read(columns=[self.columns.label])
        return _labels(table.column(0).combine_chunks())

    def _first_shape(self) -> tuple[int, int]:
        for file in self._files["train"]:
            ask = partial(self._shape_in, file.path)
            shape = patiently(self._filesystem, file.path, ask)
            if shape is not None:
                return shape
        raise DataError(
            f"none of the first {_FIRST_IMAGES} images of the training split of {self.uri} can "
            "be decoded; expected encoded images such as JPEG or PNG; change data.uri"
        )

    def _shape_in(self, path: str) -> tuple[int, int] | None:
        with _open(self._filesystem, path) as handle:
            parquet = pq.ParquetFile(handle, buffer_size=1 << 20, pre_buffer=False)
            batches = parquet.iter_batches(batch_size=1, columns=[self.columns.encoded])
            for _, batch in zip(range(_FIRST_IMAGES), batches, strict=False):
                shape = image_shape(_encoded(batch.column(0))[0].as_py())
                if shape is not None:
                    return shape
        return None


def checked_names(
    names: Sequence[str] | None,
    ranges: Mapping[Stored, tuple[int, int]],
    rows: int,
    found_in: str,
    named_in: str,
) -> tuple[str, ...]:
    """The names of the classes that the labels are numbers of.

    Args:
        names: None for classes that have none but their numbers.
        ranges: smallest and largest label of each split.
        rows: number of training images.
        found_in, named_in: what holds the labels and what the names, for an error's message.

    Raises:
        DataError: the labels are ids, negative, or beyond the classes.
    """
    last = ranges["train"][1]
    if names is None and last >= rows:
        raise DataError(
            f"the labels of {found_in} go up to {last} for {rows} training images; expected the "
            f"numbers of classes, from 0 on; change the labels, or name all classes in {named_in}"
        )
    if names is None:
        names = [str(label) for label in range(max(last + 1, 1))]
    for split, (low, high) in ranges.items():
        if low < 0 or high >= len(names):
            raise DataError(
                f"the labels of the {_SPLIT_WORDS[split]} split of {found_in} go from {low} to "
                f"{high}; expected 0 to {len(names) - 1} for {len(names)} classes; change the "
                f"labels, or name all classes in {named_in}"
                + ("; a label that is missing counts as -1" if low == -1 else "")
            )
    return tuple(names)


def read_part(filesystem: Any, part: ParquetPart, columns: Columns) -> Iterator[Chunk]:
    """Read the wanted rows of one row group: the work of one thread."""
    for rows, files, labels in read_encoded(filesystem, part, columns):
        yield Chunk(rows, files.to_pylist(), labels)


def read_encoded(filesystem: Any, part: ParquetPart, columns: Columns) -> Iterator[_Piece]:
    """The wanted rows of one row group, some hundred at a time: row numbers, contents of image
    files as an Arrow array of binary, and labels. Storage that does not answer is waited for, anew
    after each piece."""
    left, pieces = part, None

    def following() -> _Piece | None:
        nonlocal pieces
        pieces = pieces or _encoded_rows(filesystem, left, columns)
        try:
            return next(pieces, None)
        except Exception:
            pieces = None  # the next try opens the file again
            raise

    while (piece := patiently(filesystem, part.path, following)) is not None:
        yield piece
        left = replace(left, rows=left.rows[len(piece[0]) :])


def _encoded_rows(filesystem: Any, part: ParquetPart, columns: Columns) -> Iterator[_Piece]:
    with _open(filesystem, part.path) as handle:
        parquet = pq.ParquetFile(handle, pre_buffer=True)
        first = part.first
        count = parquet.metadata.row_group(part.group).num_rows
        for batch in parquet.iter_batches(
            min(CHUNK_ROWS, max(1, count * _CHUNK_BYTES // max(1, part.size))),
            row_groups=[part.group],
            columns=[columns.encoded, columns.label],
            use_threads=False,
        ):
            begin, end = np.searchsorted(part.rows, (first, first + len(batch)))
            if begin < end:
                rows = part.rows[begin:end]
                taken = batch if len(rows) == len(batch) else batch.take(pa.array(rows - first))
                image, label = taken.column(columns.image), taken.column(columns.label)
                yield rows, _encoded(image), _labels(label)
            first += len(batch)
            if end == len(part.rows):
                break


def _open(filesystem: Any, path: str) -> Any:
    # Arrow asks for exactly the ranges that it needs; read-ahead would fetch most data twice.
    return filesystem.open(path, "rb", cache_type="none")


def _columns(schema: pa.Schema, uri: str) -> Columns:
    found = ", ".join(f"{field.name}: {field.type}" for field in schema)
    for image in (name for name in _IMAGE_COLUMNS if name in schema.names):
        kind = schema.field(image).type
        if _is_binary(kind):
            encoded = image
        elif _has_bytes(kind):
            encoded = f"{image}.bytes"
        else:
            continue
        for label in (name for name in _LABEL_COLUMNS if name in schema.names):
            if pa.types.is_integer(schema.field(label).type):
                return Columns(image, encoded, label)
    raise DataError(
        f"{uri} has the columns {found[:300]}; expected image: struct<bytes, path> or binary, and "
        "label: an integer; rename or convert the columns"
    )


def _has_bytes(kind: pa.DataType) -> bool:
    place = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    return place >= 0 and _is_binary(kind.field(place).type)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _encoded(column: pa.Array) -> pa.Array:
    if not pa.types.is_struct(column.type):
        return column
    return column.field("bytes") if not column.null_count else column.flatten()[0]


def _labels(column: pa.Array) -> NDArray[np.int64]:
    # A missing label becomes -1, which no range of classes admits.
    return np.asarray(column.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False))


def _label_statistics(footer: pq.FileMetaData, label: str) -> list[tuple[int, int]] | None:
    """(smallest, largest) label of each row group, or None if a group does not say."""
    ranges = []
    for group in range(footer.num_row_groups):
        metadata = footer.row_group(group)
        if not metadata.num_rows:
            continue
        for index in range(metadata.num_columns):
            column = metadata.column(index)
            if column.path_in_schema == label:
                statistics = column.statistics
                if statistics is None or not statistics.has_min_max or statistics.null_count:
                    return None
                ranges.append((int(statistics.min), int(statistics.max)))
    return ranges


def _matching(prefix: str, entries: dict[str, bool]) -> list[str]:
    """Names of a split: the exact one if it is there, else its numbered parts, else all that begin
    like it."""
    for exact in (f"{prefix}.parquet", prefix):
        if exact in entries and entries[exact] == (exact == prefix):
            return [exact]
    alike = sorted(
        name
        for name, folder in entries.items()
        if name.startswith(prefix) and (folder or name.endswith(".parquet"))
    )
    # beside train-00000.parquet, trainval-00000.parquet is of another split
    parts = re.compile(rf"{prefix}[-_.]?\d")
    return [name for name in alike if parts.match(name)] or alike


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _same(path: str, other: str) -> bool:
    return path.strip("/") == other.strip("/")


def _hidden(path: str) -> bool:
    """Whether a file, or a folder that it is in, is another program's: of a write that was killed,
    for example."""
    return any(part.startswith(("_", ".")) for part in path.split("/"))
