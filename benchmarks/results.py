"""Figures for the documentation, from finished runs.

    python benchmarks/results.py record runs/latest --command "make demo"
    python benchmarks/results.py render

`record` keeps a finished run's summary, the settings that matter and the hardware as one JSON
file in benchmarks/results/; `render` writes docs/results.md, docs/accuracy.svg and the tables of
docs/performance.md and docs/reliability.md from all that is there. No figure of a table is typed
by hand.
"""

import argparse
import json
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

from accuracy_tables import section as comparison
from chaos_table import render as chaos
from markdown_table import row
from proxy_table import section as ranking
from speed_tables import performance
from verdict_table import section as verdict

from stp_ray.artifacts import Store
from stp_ray.report import accuracy_against_macs

HERE = Path(__file__).resolve().parent
KEPT = HERE / "results"
DOCS = HERE.parent / "docs"

#: One line of explanation for each recipe, in the order of the page.
RECIPES = {
    "demo": "Digits (scikit-learn, 8 px), ResNet-20, 360 test images: one image is 0.28 points.",
    "cifar10_resnet20_cpu": (
        "CIFAR-10 (JPEG) resized to 16 px, ResNet-20, 10,000 test images; a reduced protocol for "
        "two CPU cores. The control is the pruned shape trained from scratch for as many epochs "
        "as the weights of the pruned network have seen: those of the baseline, which the supernet "
        "starts as, of the supernet and of the ladder; on the same images, with the baseline's "
        "options and the same teacher. Main is measured after the supernet, a quarter of its own "
        "epochs into its training and at half of the learning rate."
    ),
}


def record(uri: str, command: str, note: str) -> Path:
    """Keep what a finished run says about itself."""
    store = Store(uri)
    summary, config = store.read_json("summary.json"), store.read_json("config.json")
    environment = store.read_json("environment.json")
    stages = store.read_json("manifest.json")["stages"]
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    for entry in summary["budgets"].values():
        entry.pop("uri")
    summary.pop("storage")
    content = {
        "recipe": config["name"],
        "seed": config["seed"],
        "command": command,
        "note": note,
        "revision": revision,
        "hardware": {key: environment[key] for key in ("cpus", "machine", "gpu")},
        "packages": environment["packages"],
        "workers": config["cluster"]["num_workers"],
        "epochs": {
            "baseline": (config["baseline"] or {}).get("epochs"),
            "supernet": config["supernet"]["optimisation"]["epochs"],
            "finalize": config["finalize"]["optimisation"]["epochs"],
        },
        "stage_seconds": {name: round(stage["seconds"], 1) for name, stage in stages.items()},
        "summary": summary,
    }
    KEPT.mkdir(exist_ok=True)
    path = KEPT / f"{config['name']}-seed{config['seed']}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def render() -> None:
    """Write docs/results.md and the picture of the README."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(KEPT.glob("*.json")):
        content = json.loads(path.read_text())
        runs[content["recipe"]].append(content)
    parts = [
        "# Results",
        "",
        "Written by `python benchmarks/results.py render` from the runs recorded in "
        "`benchmarks/results/`. Top-1 and retention in per cent; retention is against a dense "
        "network trained separately for the same epochs (what starts as that network has its own "
        "besides), and main is the run's own main network. Fewer than three seeds are an "
        "observation, not a claim.",
        "",
    ]
    parts += verdict(KEPT / "accuracy", KEPT / "proxy")
    for recipe in sorted(runs, key=lambda name: list(RECIPES).index(name)):
        parts += _section(recipe, runs[recipe])
    parts += comparison(KEPT / "accuracy", DOCS)
    parts += ranking(KEPT / "proxy", DOCS)
    parts += _calibration()
    parts += [
        "## What was not measured",
        "",
        "- No run of the recipes `cifar10_resnet56` and `imagenet_resnet50`: the accuracies in "
        "their heads are expected, not measured. The comparison with ResNet-56 above is no run of "
        "the pipeline.",
        "- Nothing of the pipeline on a GPU, nor a step's time or memory there: only the "
        "comparison with ResNet-56 was run on one.",
        "- Latency of the recorded runs is that of one image in eager PyTorch on one CPU thread; "
        "other runtimes are in [performance](performance.md).",
        "",
    ]
    (DOCS / "results.md").write_text("\n".join(parts))
    performance(KEPT / "speed", DOCS / "performance.md")
    chaos(KEPT / "chaos" / "runs.jsonl", DOCS / "reliability.md")
    for recipe in ("cifar10_resnet20_cpu", "demo"):
        if recipe in runs:
            picture = accuracy_against_macs(runs[recipe][0]["summary"], "svg")
            (DOCS / "accuracy.svg").write_bytes(picture)
            break


def _calibration() -> list[str]:
    """How much the images matter that BatchNorm statistics are measured on."""
    found = [json.loads(path.read_text()) for path in sorted(KEPT.glob("calibration/*.json"))]
    if not found:
        return []
    lines = [
        "## Calibration",
        "",
        "Top-1 of the same pruned weights with BatchNorm statistics of plain training images and "
        "of augmented ones, which is what the pipeline does (`python benchmarks/calibration.py "
        "RUN`).",
        "",
        row(["run", "seed", "budget", "images", "plain", "augmented"]),
        row(["---"] * 6),
    ]
    for run in found:
        for label, top1 in run["top1"].items():
            figures = [_pct(top1["plain"]), _pct(top1["augmented"])]
            lines.append(row([run["recipe"], run["seed"], label, run["images"], *figures]))
    return [*lines, ""]


def _section(recipe: str, runs: list[dict[str, Any]]) -> list[str]:
    first = runs[0]
    epochs = first["epochs"]
    lines = [
        f"## {recipe}",
        "",
        RECIPES[recipe],
        "",
        f"Command: `{first['command']}`. {first['hardware']['cpus']} CPU cores "
        f"({first['hardware']['machine']}), {first['hardware']['gpu'] or 'no GPU'}, "
        f"{first['workers']} data-parallel workers, torch {first['packages']['torch']}, "
        f"ray {first['packages']['ray']}. Epochs: baseline {epochs['baseline']}, "
        f"supernet {epochs['supernet']} + finalize {epochs['finalize']}.",
        "",
    ]
    lines += [f"Note: {run['note']}" for run in runs if run["note"]]
    controls = any("control_top1" in b for run in runs for b in run["summary"]["budgets"].values())
    heading = ["seed", "dense", "main", "budget", "pruned", "retention"]
    heading += ["control"] if controls else []
    heading += ["MACs", "params", "latency ms (dense)", "seconds"]
    lines += ["", row(heading), row(["---"] * len(heading))]
    for run in runs:
        summary = run["summary"]
        for label, entry in summary["budgets"].items():
            cells = [run["seed"], _pct(summary["dense_top1"]), _pct(summary["main_top1"]), label]
            cells += [_pct(entry["top1"]), _pct(entry["retention_dense"])]
            cells += [_pct(entry.get("control_top1"))] if controls else []
            cells += [
                f"{entry['macs'] / summary['macs']:.3f} of {summary['macs']:,}",
                f"{entry['params']:,}",
                f"{entry['latency_ms']:.2f} ({entry['dense_latency_ms']:.2f})",
                f"{summary['seconds']:.0f}",
            ]
            lines.append(row(cells))
    lines.append("")
    if len(runs) > 1:
        lines += ["Over seeds, mean ± standard deviation:", ""]
        for label in first["summary"]["budgets"]:
            kept = [run["summary"]["budgets"][label]["retention_dense"] for run in runs]
            spread = statistics.stdev(kept)
            lines.append(f"- {label}: retention {statistics.mean(kept):.2f} ± {spread:.2f}")
        lines.append("")
    stages = ", ".join(f"{name} {seconds:g} s" for name, seconds in first["stage_seconds"].items())
    return [*lines, f"Time by stage, seed {first['seed']}: {stages}.", ""]


def _pct(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    actions = parser.add_subparsers(dest="action", required=True)
    keep = actions.add_parser("record", help="keep the figures of a finished run")
    keep.add_argument("uri", help="the run's folder or URI")
    keep.add_argument("--command", required=True, help="the command that made it")
    keep.add_argument("--note", default="", help="anything a reader should know")
    actions.add_parser("render", help="write the figures of the documentation")
    arguments = parser.parse_args()
    if arguments.action == "record":
        print(record(arguments.uri, arguments.command, arguments.note))
    else:
        render()


if __name__ == "__main__":
    main()
