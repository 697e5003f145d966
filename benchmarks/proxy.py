"""Whether the search's scores rank: them against the accuracy after the full distillation.

    python benchmarks/proxy.py cifar10_resnet20_cpu --data FOLDER --work FOLDER

For each budget: the shape that the search found, the uniform one and random ones, each scored as
a slice of the same supernet, as it is and after a few steps of distillation, and then distilled as
STP does. Each is one line of `benchmarks/results/proxy/PROTOCOL.jsonl`; what is there already is
not trained again, and gets the scores that it lacks. With `--again` each shape is distilled once
more, by another order of the images: how well two trainings agree bounds how well a score can rank.
`benchmarks/results.py render` makes the table and the plot.
"""

import argparse
import json
import math
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accuracy import PROTOCOLS, add_data, protocol_of
from bench import Bench, Images
from contenders import OWN_SHAPE, Judge, Limit, Stp
from filling import is_there, read
from surroundings import surroundings

from stp_ray.elastic import Budget, Subnet, Supernet
from stp_ray.method import Exploration

SEARCH = Exploration()
#: Steps of distillation before a slice is scored: on few images, as `tuned scores` has them, and on
#: as many as the search has by default, at the learning rate of the second phase, those of what is
#: promoted and of finalists.
FEW = {str(steps): steps for steps in (0, 10, 25, 50, 100)}
MANY = {
    f"{steps} on {SEARCH.tuning_images}": steps
    for steps in (SEARCH.tuning_steps, SEARCH.final_steps)
}
KEPT = Path(__file__).resolve().parent / "results" / "proxy"


def shapes(
    bench: Bench, stp: Stp, net: Supernet, budget: float, count: int
) -> list[tuple[str, Subnet]]:
    """So many different shapes within the budget, and where each comes from."""
    found = [
        (name, replace(stp, target=name).shape(bench, net, budget)[0])
        for name in ("explored", "uniform")
    ]
    rng = random.Random(bench.seed)
    while len(found) < count:
        drawn = net.space.sample(rng, Budget(macs=budget))
        if drawn not in [subnet for _, subnet in found]:
            found.append(("random", drawn))
    return found


def distilled(bench: Bench, stp: Stp, budget: float) -> float:
    """Top-1 after the whole distillation."""
    return bench.top1(stp(bench, budget, Limit(bench.protocol.epochs)).network.eval())


def same(judge: Judge, line: dict[str, Any], images: int) -> None:
    """Stop where a score is not what it was: another supernet than the one that a budget's shapes
    were trained from has nothing to say of them."""
    found, known = judge(Subnet.from_json(line["subnet"]), images, 0), line["scores"]["0"]
    if not math.isclose(found, known, rel_tol=1e-4):
        raise SystemExit(
            f"a slice scores {found:.6f} that scored {known:.6f}; expected the supernet that the "
            "lines were recorded with; pass its --work folder, or --out for lines of a new one"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("protocol", choices=PROTOCOLS)
    add_data(parser)
    parser.add_argument(
        "--method",
        metavar="METHOD",
        choices=[name for name, method in OWN_SHAPE.items() if isinstance(method, Stp)],
        default="stp, taught, four subnets a step",
        help="a form of STP that contenders.py names",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, nargs="*", help="default: those of the protocol")
    parser.add_argument("--subnets", type=int, default=12, help="for each budget, 2 or more")
    parser.add_argument("--again", action="store_true", help="distil each shape twice")
    parser.add_argument(
        "--work", type=Path, help="where the supernet is kept; default: a temporary folder"
    )
    parser.add_argument("--out", type=Path, help="the file of results")
    chosen = parser.parse_args()
    protocol = protocol_of(parser, chosen.protocol, chosen.data)
    out = chosen.out or KEPT / f"{chosen.protocol}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, around = Images(protocol.data, device), surroundings(device)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(protocol, images, chosen.seed, chosen.work or Path(scratch))
        stp: Stp = OWN_SHAPE[chosen.method]
        net, _, _ = stp.stimulated(bench)
        few = Judge(bench, net, Stp.tuning_images, Stp.tuning_lr)
        many = Judge(bench, net, SEARCH.tuning_images, stp.restart or stp.turn)
        judges = {key: (few, steps) for key, steps in FEW.items()}
        judges |= {key: (many, steps) for key, steps in MANY.items()}
        held_out = images.count("holdout")
        for budget in chosen.budget or protocol.budgets:
            run = {"method": chosen.method, "seed": chosen.seed, "budget": budget}
            for line in [each for each in read(out) if run.items() <= each.items()][:1]:
                same(few, line, held_out)
            for how, subnet in shapes(bench, stp, net, budget, chosen.subnets):
                cell = {**run, "subnet": subnet.to_json()}
                lines, of = read(out), replace(stp, target=subnet)
                line = next((each for each in lines if is_there(cell, [each])), None)
                if line is None:
                    started = time.perf_counter()
                    line = {
                        **cell, "how": how, "scores": {}, "top1": distilled(bench, of, budget),
                        "macs": net.cost(subnet).macs, "full_macs": bench.full_macs,
                        "seconds": round(time.perf_counter() - started, 1), **around,
                    }  # fmt: skip
                    lines.append(line)
                known = line["scores"]
                line["scores"] = {
                    key: known[key] if key in known else judge(subnet, held_out, steps)
                    for key, (judge, steps) in judges.items()
                }
                write(out, lines)
                if chosen.again and "again" not in line:
                    line["again"] = distilled(bench, replace(of, training=1), budget)
                    write(out, lines)
                print(
                    f"seed {chosen.seed}  {budget:<5} {how:9} scores "
                    f"{'  '.join(f'{score:.4f}' for score in line['scores'].values())}  "
                    f"top-1 {line['top1']:6.2f} {line.get('again', '')}  {line['seconds']:7.1f} s",
                    flush=True,
                )


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """All lines at once: a file that is cut off would have lost what took hours."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.rename(path)


if __name__ == "__main__":
    main()
