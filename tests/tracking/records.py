"""What wandb keeps on disk, read back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


class Kept:
    """The .wandb file of one stage.

    Attributes:
        run: its first record.
        history: rows of metrics, without wandb's own.
        summary: figures of the stage.
        axes: metric -> what it is drawn over.
        artifacts: (name, type, whether it was used, references) in the order they were named.
        stats: names of the system metrics.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.run: Any = None
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.axes: dict[str, str] = {}
        self.artifacts: list[tuple[str, str, bool, dict[str, str]]] = []
        self.stats: set[str] = set()
        for record in records(path):
            match record.WhichOneof("record_type"):
                case "run":
                    self.run = self.run or record.run
                case "history":
                    row = _items(record.history.item)
                    self.history.append({k: v for k, v in row.items() if not k.startswith("_")})
                case "summary":
                    self.summary |= _items(record.summary.update)
                case "metric":
                    metric = record.metric
                    self.axes[metric.name or metric.glob_name] = metric.step_metric
                case "artifact":
                    artifact = record.artifact
                    references = {entry.path: entry.ref for entry in artifact.manifest.contents}
                    used = artifact.use_after_commit
                    self.artifacts.append((artifact.name, artifact.type, used, references))
                case "stats":
                    self.stats |= {item.key for item in record.stats.item}

    def column(self, name: str) -> list[Any]:
        """What was logged under a name."""
        return [row[name] for row in self.history if name in row]

    def table(self, name: str) -> dict[str, Any]:
        """A table's columns and data."""
        (value,) = self.column(name)
        return json.loads((self.folder / "files" / value["path"]).read_text())


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *parents, name = item.nested_key or [item.key]
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = json.loads(item.value_json)
    return found
