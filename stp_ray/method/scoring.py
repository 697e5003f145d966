"""How good a candidate of the search is: how well its slice imitates the main network, as it is
or after a short distillation."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from ..elastic.subnet import Subnet
from ..elastic.supernet import Supernet
from ..errors import RunError
from .calibrate import calibrate
from .checks import require
from .modes import device_of, inspecting
from .objective import DenseObjective
from .training import Optimisation, Trainer

#: Images in a step of the short distillation.
TUNING_BATCH = 64


def reference_logits(net: Supernet, images: Iterable[Tensor]) -> Tensor:
    """The main network's logits [N, C] in eval mode, for `score`; computed once and shared.

    Args:
        net: the supernet.
        images: batches [B, C, H, W], N images in all.
    """
    device = device_of(net)
    with inspecting(net):
        return torch.cat([net(batch.to(device)) for batch in images])


def score(
    net: Supernet,
    subnet: Subnet,
    calibration: Iterable[Tensor],
    images: Iterable[Tensor],
    main_logits: Tensor,
) -> float:
    """The distillation loss of a slice: mean KL(z_M || z_a) over the images, lower is better.

    BatchNorm statistics are measured on `calibration`, the rest runs in eval mode without
    gradients; the network is left as it was [paper; recalibration: ST].

    Args:
        net: the supernet.
        subnet: the slice to score.
        calibration: batches of training images [B, ...].
        images: batches of held-out training images [B, ...], N in all.
        main_logits: of the main network for those images in that order, [N, C].

    Raises:
        ValueError: the images are not N, or there are none.
    """
    stats = calibrate(net, subnet, calibration)
    device = device_of(net)
    with inspecting(net):
        return _divergence(
            lambda batch: net(batch.to(device), subnet, stats=stats), images, main_logits
        )


def tuned_score(
    net: Supernet,
    subnet: Subnet,
    calibration: Iterable[Tensor],
    learnt: Callable[[], Iterable[Tensor]],
    learnt_logits: Tensor,
    images: Iterable[Tensor],
    main_logits: Tensor,
    *,
    steps: int,
    options: Optimisation,
    seed: int,
) -> float:
    """As `score`, after a copy of the slice has learnt from the main network for a few steps.

    A slice as it is shows how well it shares its weights with the others; a few steps show how well
    it learns by itself, which is what it is chosen for: see docs/results.md [ours]. The network
    is left as it was.

    Args:
        net: the supernet.
        subnet: the slice to score.
        calibration: batches of training images [B, ...] to measure BatchNorm statistics on first.
        learnt: called for each pass: batches of the training images [B, ...] that the steps take
            their own from, M in all and always the same; none is larger than the first.
        learnt_logits: of the main network for those in that order, [M, C].
        images: batches of held-out training images [B, ...], N in all.
        main_logits: of the main network for those, [N, C].
        steps: steps of the optimiser, with 64 images each or as many as the first batch has.
        options: how the pruned network will be trained: optimiser, arithmetic, and the learning
            rate, which is scaled to the batch and falls to zero.
        seed: of dropout and its kin.

    Returns:
        Not a number where the steps lead to numbers that are not finite.

    Raises:
        ValueError: the images are not N, or there are none.
    """
    student = net.extract(subnet, calibrate(net, subnet, calibration))
    size = min(TUNING_BATCH, len(next(iter(learnt()))))
    labels = learnt_logits.float().softmax(dim=1)

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels, time and again."""
        while True:
            count = 0
            for batch in learnt():
                said = labels[count : count + len(batch)]
                count += len(batch)
                for piece in zip(batch.split(size), said.split(size), strict=True):
                    if len(piece[0]) == size:
                        yield piece

    options = replace(
        options, epochs=1, batch_size=size, lr=options.lr * size / options.batch_size, min_lr=0.0,
        warmup_epochs=0.0, ema=None, checkpoint_every=0,
    )  # fmt: skip
    device = device_of(net)
    trainer = Trainer(
        DenseObjective(student), options, steps_per_epoch=steps, seed=seed, device=device
    )

    def batches(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from islice(pieces(), first, steps)

    try:
        for _ in trainer.run(batches, lambda rng, progress: ()):
            pass
    except RunError:  # it diverged: the worst of scores, and no reason to stop the search
        return math.nan
    with inspecting(student):
        return _divergence(lambda batch: student(batch.to(device)), images, main_logits)


def _divergence(
    forward: Callable[[Tensor], Tensor], images: Iterable[Tensor], main_logits: Tensor
) -> float:
    """Mean KL(z_M || z) in nats."""
    count, losses = 0, []
    for batch in images:
        student = forward(batch).float()
        teacher = main_logits[count : count + len(batch)].to(student.device).float()
        count += len(batch)
        if len(teacher) < len(batch):
            break
        losses.append(
            F.kl_div(
                F.log_softmax(student, dim=1),
                F.log_softmax(teacher, dim=1),
                reduction="sum",
                log_target=True,
            )
        )
    require(
        0 < count == len(main_logits),
        "the number of images",
        count,
        f"as many as rows of main_logits ({len(main_logits)}), at least 1",
        "score the images that the logits were computed for",
    )
    return math.fsum(torch.stack(losses).tolist()) / count
