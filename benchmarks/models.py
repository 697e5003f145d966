"""What can be pruned in other people's classifiers, at their own size.

    python -m benchmarks.models            # writes docs/models.md
    python -m benchmarks.models resnet50   # prints the row of one model

Tracing needs shapes alone, so most models are made without weights. Seconds are the
processor time of one tracing on one thread.
"""

import argparse
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from stp_ray.elastic import Supernet
from stp_ray.errors import TraceError
from tests.elastic.zoo import TIMM, own_size, torchvision_model, torchvision_names

DOCS = Path(__file__).resolve().parents[1] / "docs"

#: What the tests check, and others that show limits.
MORE_TIMM = ["deit_small_patch16_224", "efficientformer_l1", "levit_128s"]


@dataclass(frozen=True)
class Row:
    """One model: what was found, or why it could not be traced."""

    name: str
    macs: int = 0
    axes: int = 0
    blocks: int = 0
    share: float = 0.0
    least: float = 0.0
    seconds: float = 0.0
    frozen: tuple[tuple[str, int], ...] = ()
    error: str = ""


def look(library: str, name: str) -> Row:
    """Trace a model of torchvision or timm at its own image size."""
    # Some constructors compute with tensors, which has to be possible.
    device = torch.device("cpu" if name.startswith("regnet") else "meta")
    with device:
        if library == "timm":
            import timm

            model = timm.create_model(name)
            size = model.default_cfg["input_size"][-1]
        else:
            size = own_size(name)
            model = torchvision_model(name, size, num_classes=1000)
        started = time.process_time()
        try:
            net = Supernet.trace(model.eval(), torch.empty(1, 3, size, size))
        except TraceError as error:
            return Row(name, error=_short(str(error).partition("; expected")[0]))
        seconds = time.process_time() - started
    full, least = net.cost(), net.cost(net.space.smallest)
    reasons: dict[str, int] = {}
    for frozen in net.frozen:
        reason = _short(frozen.reason)
        reasons[reason] = reasons.get(reason, 0) + 1
    return Row(
        name,
        full.macs,
        len(net.space.axes),
        len(net.space.blocks),
        net.space.elastic_share,
        least.macs / full.macs,
        seconds,
        tuple(reasons.items()),
    )


def page(tables: dict[str, list[Row]]) -> str:
    """docs/models.md."""
    lines = [
        "# Models",
        "",
        "Written by `python -m benchmarks.models`: classifiers of torchvision and timm, traced as "
        "they are at their own image size. *Elastic* is the share of the MACs that some width or "
        "block can change, *least* what the smallest subnet costs of the whole (widths at an "
        "eighth, as far as the divisor allows, and all droppable blocks gone), *seconds* the "
        f"processor time of tracing, torch {torch.__version__.partition('+')[0]}. `make "
        "test-models` checks them, most on reduced images: sliced run against extraction, prices "
        "against PyTorch's counter, gradients.",
    ]
    for library, rows in tables.items():
        lines += _section(library, rows)
    return "\n".join(lines) + "\n"


def _section(library: str, rows: list[Row]) -> list[str]:
    failed = [row for row in rows if row.error]
    short = [row for row in rows if not row.error and row.share < _goal(row.name)]
    lines = [
        "",
        f"## {library}",
        "",
        f"{len(rows) - len(failed)} of {len(rows)} are traced.",
        "",
        "| model | MACs | elastic % | least % | axes | blocks | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.name} | {r.macs / 1e6:,.0f} M | {100 * r.share:.1f} | {100 * r.least:.2f} "
        f"| {r.axes} | {r.blocks} | {r.seconds:.1f} |"
        for r in rows
        if not r.error
    ]
    lines += ["", f"### What falls short, {library}", ""]
    lines.append(
        "Elastic are less than 95 % of the MACs (90 % of ViT, DeiT and Swin), for the reasons that "
        f"the next list gives: {', '.join(f'{r.name} ({100 * r.share:.1f} %)' for r in short)}."
        if short
        else "None: of each at least 95 % of the MACs are elastic (90 % of ViT, DeiT and Swin)."
    )
    lines += ["", f"### What stays whole, {library}", ""]
    for row in rows:
        for reason, count in row.frozen:
            lines.append(f"- {row.name}, {count} layer{'s' * (count > 1)}: {reason}")
    if failed:
        lines += ["", f"### What cannot be traced, {library}", ""]
        lines += [f"- {row.name}: {row.error}" for row in failed]
    return lines


def _goal(name: str) -> float:
    """The share of the MACs that should be elastic."""
    return 0.9 if name.startswith(("vit", "deit", "swin")) else 0.95


def _short(reason: str) -> str:
    """A reason without the name of the operation, so that those of one line of the model are one,
    and without the user's line of code, which is not ours to repeat."""
    if reason.startswith("no width below"):
        return "too few units for a smaller width"
    text = " ".join("".join(reason.split("`")[::2]).split()).rstrip(": ")
    return re.sub(r": \w+ at ", ", ", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="models to print; none writes the page")
    names = parser.parse_args().names
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if names:
        for name in names:
            print(look("timm" if name in {*TIMM, *MORE_TIMM} else "torchvision", name))
        return
    timm = sorted([*TIMM, *MORE_TIMM])
    zoos = {"torchvision": torchvision_names(), "timm": timm}
    tables = {library: [look(library, name) for name in zoo] for library, zoo in zoos.items()}
    (DOCS / "models.md").write_text(page(tables))


if __name__ == "__main__":
    main()
