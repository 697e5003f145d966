"""What each of two data-parallel processes does; test_distributed starts them once for all
of its tests, as `python -m tests.method.workers RANK FOLDER`."""

import datetime
import random
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from stp_ray.errors import RunError
from stp_ray.method import (
    Expansion,
    ExpansionObjective,
    Optimisation,
    Stimulation,
    StimulativeObjective,
    Trainer,
    ladder,
    sampler,
)

from .networks import batches, images_and_labels, supernet

OPTIONS = Optimisation(epochs=2, lr=0.05)


def join(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )


def one_step(rank: int) -> dict[int, dict[str, object]]:
    return {count: one_step_of(rank, count) for count in (1, 3)}


def one_step_of(rank: int, count: int) -> dict[str, object]:
    """Gradients after a step with `count` subnets, and the bytes that were reduced for it."""
    stimulation = Stimulation(subnets=count)
    net = supernet()
    ddp = DistributedDataParallel(StimulativeObjective(net, stimulation))
    reduced = []

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced.append(bucket.buffer().nbytes)
        future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    subnets = sampler(stimulation, net.space, [])(random.Random(rank), 0.0)
    images, labels = images_and_labels(8, seed=rank)
    ddp(images, labels, subnets)["loss"].backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    return {"grads": grads, "reduced": sum(reduced)}


def resumed(rank: int) -> dict[str, object]:
    found = {}
    for main in ("train", "drop"):

        def make(seed: int, main: str = main) -> tuple[Trainer, object]:
            net = supernet(dropout=0.3, seed=seed)
            expansion = Expansion(main=main, p_start=0.4)
            objective = ExpansionObjective(net, net.space.uniform(0.25), expansion)
            trainer = Trainer(
                objective,
                OPTIONS,
                steps_per_epoch=3,
                seed=5,
                rank=rank,
                world_size=2,
                wrap=lambda module: DistributedDataParallel(
                    module, find_unused_parameters=not objective.uses_all_parameters
                ),
            )
            return trainer, ladder(net.space, net.space.uniform(0.25), expansion)

        def mine(epoch: int, first: int) -> object:
            return ((x[rank::2], y[rank::2]) for x, y in batches(3)(epoch, first))

        whole, draw = make(0)
        state, drawn = None, []

        def noted(*of: object, draw: object = draw, drawn: list = drawn) -> object:
            subnets = draw(*of)
            drawn.append(len(subnets))
            return subnets

        for progress in whole.run(mine, noted):
            if progress.step == 4:
                state = whole.state()
        again, draw = make(1)
        again.load(*state)
        for _ in again.run(mine, draw):
            pass
        found |= {f"{main}.whole.{n}": t for n, t in whole.state()[0].items()}
        found |= {f"{main}.again.{n}": t for n, t in again.state()[0].items()}
        found[f"{main}.drawn"] = torch.tensor(drawn)
    return found


def trained_in_shares(shares: int, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
    """Weights and buffers after two epochs, each step in so many shares."""
    net = supernet(dropout=0.3)
    trainer = Trainer(
        StimulativeObjective(net, Stimulation()),
        OPTIONS,
        steps_per_epoch=3,
        seed=5,
        rank=rank,
        world_size=world_size,
        shares=shares,
        wrap=DistributedDataParallel if world_size > 1 else lambda module: module,
    )

    def of(share: int) -> object:
        return lambda epoch, first: (
            (x[share::shares], y[share::shares]) for x, y in batches(3)(epoch, first)
        )

    for _ in trainer.run([of(s) for s in trainer.shares], sampler(Stimulation(), net.space, [])):
        pass
    return trainer.state()[0]


def shared(rank: int) -> dict[str, object]:
    return {str(shares): trained_in_shares(shares, rank, 2) for shares in (2, 3)}


def spoilt_on_one_rank(rank: int) -> dict[str, object]:
    net = supernet()
    trainer = Trainer(
        StimulativeObjective(net, Stimulation()),
        OPTIONS,
        steps_per_epoch=3,
        seed=5,
        rank=rank,
        world_size=2,
        wrap=DistributedDataParallel,
    )

    def odd(epoch: int, first: int) -> object:
        for step, (images, labels) in enumerate(batches(3)(epoch, first), start=first):
            yield (images * float("nan") if step == 2 and rank == 1 else images), labels

    message = ""
    try:
        for _ in trainer.run(odd, sampler(Stimulation(), net.space, [])):
            pass
    except RunError as error:
        message = str(error)
    finite = all(bool(p.isfinite().all()) for p in net.parameters())
    return {"message": message, "finite": finite, "step": trainer.step}


if __name__ == "__main__":
    join(int(sys.argv[1]), sys.argv[2])
    found = {
        work.__name__: work(dist.get_rank())
        for work in (one_step, resumed, shared, spoilt_on_one_rank)
    }
    torch.save(found, f"{sys.argv[2]}/{dist.get_rank()}.pt")
    dist.destroy_process_group()
