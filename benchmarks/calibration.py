"""What it matters which images BatchNorm statistics are measured on, in a finished run.

    python benchmarks/calibration.py runs/latest

Evaluates the pruned networks of the run with statistics of plain training images and of augmented
ones (what the pipeline does), weights as they are; `benchmarks/results.py render` shows both.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from stp_ray import load
from stp_ray.artifacts import Store
from stp_ray.config import load_config
from stp_ray.data import describe
from stp_ray.method import evaluate
from stp_ray.stages.images import share

KEPT = Path(__file__).resolve().parent / "results" / "calibration"


def recalibrated(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    """The model with the mean statistics of these batches."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
    with torch.no_grad():
        for images in batches:
            model(images)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("uri", help="the run's folder or URI")
    run = Store(parser.parse_args().uri)
    config, summary = load_config(run.read_json("config.json")), run.read_json("summary.json")
    images = share(config.data, describe(config.data), in_process=True).here()
    cpu, count = torch.device("cpu"), config.finalize.calibration_images
    plain = [x for x, _ in images.batches("train", cpu, count)]
    augmented = list(images.calibration(config.seed, count, cpu))
    figures = {}
    for label in summary["budgets"]:
        model = load(run.child(f"budget-{label}").uri)
        figures[label] = {
            name: evaluate(recalibrated(model, batches), images.batches("test", cpu))["top1"]
            for name, batches in (("plain", plain), ("augmented", augmented))
        }
        print(label, figures[label], flush=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    content = {
        "recipe": config.name, "seed": config.seed, "run_id": summary["run_id"], "images": count,
        "top1": figures,
    }  # fmt: skip
    path = KEPT / f"{config.name}-seed{config.seed}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
