"""The tables of docs/performance.md, from the lines that `speed.py` has written."""

import json
from pathlib import Path
from typing import Any

from markdown_table import row

START, END = "<!-- measured -->", "<!-- end of measured -->"


def performance(kept: Path, page: Path) -> None:
    """Write what was measured between the marks of the page."""
    text = page.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    parts = [*_steps(_read(kept / "step.jsonl")), *_memory(_read(kept / "memory.jsonl"))]
    parts += _parallel(_read(kept / "parallel.jsonl"))
    page.write_text("\n".join([f"{before}{START}", "", *parts, f"{END}{after}"]))


def _steps(lines: list[dict[str, Any]]) -> list[str]:
    if not lines:
        return []
    ways = list(lines[0]["ratio"])
    found = [
        "### A step beside its arithmetic",
        "",
        "Time of a step with the main network and K subnets, over the time of a dense step and of "
        "the extracted subnets alone, forward and backward; median (quartiles) over random sets of "
        "subnets, all sides in turn in one run (`python benchmarks/speed.py step --model MODEL "
        "--subnets K`). Ours is the whole step of the trainer.",
        "",
        row(["model", "px", "batch", "K", "device", "dense s", *ways]),
        row(["---"] * (6 + len(ways))),
    ]
    for line in lines:
        cells = [line["model"], line["size"], line["batch"], line["subnets"]]
        cells += [_device(line), f"{line['dense_s']:.3f}"]
        for way in ways:
            low, high = line["quartiles"][way]
            cells.append(f"{line['ratio'][way]:.2f} ({low:.2f}, {high:.2f})")
        found.append(row(cells))
    found += [
        "",
        "All at once: one graph over all networks, slices taken by autograd. One by one: a "
        "backward pass for each, slices taken by autograd. Masking: the whole network for each "
        "subnet, outputs multiplied by zeros and ones.",
        "",
    ]
    return found


def _memory(lines: list[dict[str, Any]]) -> list[str]:
    if not lines:
        return []
    ways = list(lines[0]["ratio"])
    found = [
        "### Memory of a step",
        "",
        "Growth of the peak over three steps, median of five random sets of subnets "
        "(`python benchmarks/speed.py memory --model MODEL`).",
        "",
        row(["model", "K", "device", "dense MB", *(f"{way}, of dense" for way in ways[1:])]),
        row(["---"] * (3 + len(ways))),
    ]
    for line in lines:
        cells = [line["model"], line["subnets"], _device(line), f"{line['peak_mb']['dense']:.0f}"]
        found.append(row(cells + [f"{line['ratio'][way]:.2f}" for way in ways[1:]]))
    return [*found, ""]


def _parallel(lines: list[dict[str, Any]]) -> list[str]:
    if not lines:
        return []
    found = [
        "### Data-parallel workers",
        "",
        "Workers of one thread each on one machine, DistributedDataParallel over gloo "
        "(`python benchmarks/speed.py parallel`).",
        "",
        row(["model", "workers", "images/s (one)", "efficiency", "gradient", "reduced, by K"]),
        row(["---"] * 6),
    ]
    for line in lines:
        rates, workers = line["images_per_s"], line["workers"]
        reduced = ", ".join(f"{k}: {size:,} B" for k, size in line["reduced_bytes"].items())
        cells = [line["model"], workers, f"{rates[str(workers)]:.0f} ({rates['1']:.0f})"]
        cells += [f"{line['efficiency']:.2f}", f"{line['gradient_bytes']:,} B", reduced]
        found.append(row(cells))
    return [*found, ""]


def _device(line: dict[str, Any]) -> str:
    clock = ", processor time" if line.get("clock") == "processor" else ""
    threads = f", {line['threads']} threads" if line["device"] == "x86_64" else ""
    return f"{line['device']}{threads}{clock}"


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
