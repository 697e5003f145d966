"""Folders of image files into Parquet, which streams and lives in object storage."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from .folders import FolderSource
from .source import Stored
from .storage import open_filesystem, writing

_PARTS_PER_FILE = 16


def folder_to_parquet(folder: str, uri: str) -> dict[str, int]:
    """Write `train/` and `test/` part files from a folder in torchvision's ImageFolder layout.

    The image files are stored as they are, in a random order, 256 in a row group and 4,096 in a
    file.

    Args:
        folder: local folder with train/CLASS/ and test/CLASS/ or val/CLASS/.
        uri: new or empty folder, or fsspec URI, for the result: the `data.uri` of a recipe.

    Returns:
        Number of images written of each split.

    Raises:
        DataError: the folder cannot be used, or the target holds something already.
        StorageError: the target cannot be written.
    """
    source = FolderSource(folder)
    layout = source.layout()
    filesystem, root = open_filesystem(uri)
    rows: dict[Stored, int] = {"train": layout.train_rows, "test": layout.test_rows}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", "int64")],
        metadata={"class_names": json.dumps(layout.class_names)},
    )
    with writing(uri):
        if filesystem.exists(root) and filesystem.find(root):
            raise DataError(f"{uri} holds files already; expected an empty folder; choose another")
        for split, count in rows.items():
            filesystem.makedirs(f"{root}/{split}", exist_ok=True)
            parts = source.parts(split, np.arange(count, dtype=np.int64))
            for number, start in enumerate(range(0, len(parts), _PARTS_PER_FILE)):
                path = f"{root}/{split}/part-{number:05}.parquet"
                with (
                    filesystem.open(path, "wb") as handle,
                    pq.ParquetWriter(handle, schema, compression="zstd") as writer,
                ):
                    for part in parts[start : start + _PARTS_PER_FILE]:
                        for chunk in source.read(part):
                            images = [{"bytes": data, "path": None} for data in chunk.images]
                            writer.write_table(pa.table([images, chunk.labels], schema=schema))
    return {str(split): count for split, count in rows.items()}
