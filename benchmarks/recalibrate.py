"""Measure the BatchNorm statistics of a finished run's pruned networks again, and evaluate them.

    python benchmarks/recalibrate.py runs/latest

Weights stay as they are. Prints top-1 with the statistics in the artifact, on plain training
images, and on augmented ones (what the pipeline does); with --write the run's summary takes the
last of these.
"""

import argparse

import torch
from torch import nn

from stp_ray import load
from stp_ray.artifacts import Store
from stp_ray.config import load_config
from stp_ray.data import describe
from stp_ray.method import evaluate
from stp_ray.stages.images import share


def recalibrated(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
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
    parser = argparse.ArgumentParser()
    parser.add_argument("uri")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    run = Store(arguments.uri)
    config, summary = load_config(run.read_json("config.json")), run.read_json("summary.json")
    images = share(config.data, describe(config.data), in_process=True).here()
    cpu, count = torch.device("cpu"), config.finalize.calibration_images
    for label, entry in summary["budgets"].items():
        model = load(run.child(f"budget-{label}").uri)
        plain = [x for x, _ in images.batches("train", cpu, count)]
        augmented = list(images.calibration(config.seed, count, cpu))
        for name, batches in (("artifact", None), ("plain", plain), ("augmented", augmented)):
            network = model if batches is None else recalibrated(model, batches)
            top1 = evaluate(network, images.batches("test", cpu))["top1"]
            print(f"{label} {name}: top-1 {top1:.2f}", flush=True)
        entry["top1"] = top1
        for other in ("dense", "main"):
            entry[f"retention_{other}"] = 100 * top1 / summary[f"{other}_top1"]
    if arguments.write:
        run.write_json("summary.json", summary)


if __name__ == "__main__":
    main()
