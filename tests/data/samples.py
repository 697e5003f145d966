"""Small data sets written by the tests, and where real ones are found."""

import io
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).parents[2]


def real_data(name: str) -> str:
    """URI of a real data set below STP_DATA or ../shared/data; skips the test without it."""
    root = os.environ.get("STP_DATA") or str(ROOT.parent / "shared" / "data")
    uri = f"{root.rstrip('/')}/{name}"
    filesystem, path = fsspec.core.url_to_fs(uri)
    if not filesystem.exists(path):
        pytest.skip(f"no {name} in STP_DATA or ../shared/data")
    return uri


def pixels(rows: int, size: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    """Random RGB images, uint8 [rows, 3, size, size]."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (rows, 3, size, size), dtype=np.uint8)


def encode(image: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    """One image [3, H, W] as the contents of a file; PNG keeps every pixel."""
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, kind)
    return buffer.getvalue()


def table(
    encoded: list[bytes | None],
    labels: list[int | None],
    class_names: list[str] | None = None,
) -> pa.Table:
    """A table in the layout that Hugging Face's `datasets` writes."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": None} for data in encoded]
    made = pa.table({"image": pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
    if class_names is None:
        return made
    return made.replace_schema_metadata({"class_names": json.dumps(class_names)})


def write_parquet(
    folder: Path,
    *,
    train: int = 40,
    test: int = 12,
    classes: int = 4,
    size: int = 8,
    corrupt: tuple[int, ...] = (),
    group: int = 7,
    **options: Any,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Write a data set of random PNG images; returns the training images and labels.

    `corrupt` are the training rows whose files are cut in half; `group` is the number of rows in
    a row group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"class {index}" for index in range(classes)]
    first = (np.empty(0), np.empty(0))
    for split, rows in (("test", test), ("train", train)):
        images = pixels(rows, size, seed=rows)
        labels = np.arange(rows) * 7 % classes
        encoded: list[bytes | None] = [encode(image) for image in images]
        if split == "train":
            for row in corrupt:
                data = encoded[row]
                encoded[row] = data[: len(data) // 2] if data else None
            first = images, labels
        made = table(encoded, labels.tolist(), names)
        pq.write_table(made, folder / f"{split}.parquet", row_group_size=group, **options)
    return first
