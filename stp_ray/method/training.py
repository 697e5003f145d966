"""The training loop: it yields metrics and state, and knows nothing of where they go.

Everything random is derived from (seed, step, share), so the number of steps done is all
the position that a checkpoint has to hold: a run that was stopped at a step boundary and
loaded again goes on bit for bit as if it had not been stopped.

A *share* is the part of a step that one of the recipe's workers does: its images, its subnets,
its random numbers. When fewer workers are there, each does several of them, one after the other:
a step stays the same arithmetic, in another order of summation [ours].
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..elastic.subnet import Subnet
from ..errors import RunError, StorageError
from .checks import require

Batches = Callable[[int, int], Iterable[tuple[Tensor, Tensor]]]
"""(epoch, first step of it) -> (images, labels) of one share, from that step on."""

Draw = Callable[[random.Random, float], Sequence[Subnet]]
"""(random numbers of this step, progress in [0, 1)) -> the subnets to train in this step."""

Label = Callable[[Tensor, Tensor], Tensor]
"""(images, labels), on the device -> the labels to learn, class indices [B] or soft [B, C]."""

#: Layers whose weight decays whatever its shape, such as [C, 1, 1, 1], and those that do not decay.
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MENDING = "lower lr, set grad_clip or use precision fp32, and look for bad values in the images"


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How a network is trained. Raises ValueError for a value out of range."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}  # noqa: RUF012

    epochs: int = 10
    """Passes over the training images; 0 leaves the weights as they are."""
    batch_size: int = 128
    """Images in one optimiser step, over all workers together."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW with its usual betas."""
    lr: float = 0.1
    """Learning rate after the warm-up, for the whole batch; above 0 and up to 1e30."""
    momentum: float = 0.9
    """Momentum of SGD; AdamW does not read it."""
    nesterov: bool = True
    """Nesterov's form of SGD's momentum."""
    weight_decay: float = 5e-4
    """Weight decay. Spared are biases, parameters of norms, and those that are one row of numbers
    whatever their shape, such as scales [C, 1, 1] and class tokens [1, 1, C], but for weights of
    linear layers and convolutions."""
    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises linearly; at most `epochs`."""
    min_lr: float = 0.0
    """Where the cosine ends, as a fraction of `lr`."""
    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes, in [0, 1)."""
    grad_clip: float | None = None
    """Largest L2 norm of the gradient; None leaves it as it is."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass (autocast); fp16 comes with loss scaling."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, in (0, 1); None keeps none."""
    checkpoint_every: int = 0
    """Steps between checkpoints, besides the one at the end of each epoch; 0 for that alone. A
    stream always has that alone, for it cannot start within an epoch."""

    def __post_init__(self) -> None:
        def check(holds: bool, name: str, expected: str, change: str) -> None:
            require(holds, name, getattr(self, name), expected, change)

        check(self.epochs >= 0, "epochs", "0 or more", "raise it")
        check(self.batch_size >= 1, "batch_size", "at least 1", "raise it")
        check(self.optimizer in ("sgd", "adamw"), "optimizer", "sgd or adamw", "choose one")
        check(0 < self.lr <= 1e30, "lr", "a positive number up to 1e30", "0.1 is usual for sgd")
        check(0 <= self.momentum < 1, "momentum", "a number in [0, 1)", "0.9 is usual")
        check(
            0 <= self.weight_decay < math.inf, "weight_decay", "0 or more", "5e-4 is usual for sgd"
        )
        check(
            0 <= self.warmup_epochs <= (self.epochs or math.inf),
            "warmup_epochs",
            f"between 0 and epochs ({self.epochs})",
            "shorten the warm-up or train longer",
        )
        check(0 <= self.min_lr <= 1, "min_lr", "a fraction of lr in [0, 1]", "0 is usual")
        check(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)", "0.1 is usual")
        check(
            self.grad_clip is None or 0 < self.grad_clip < math.inf,
            "grad_clip",
            "a positive norm or null",
            "1.0 is usual",
        )
        check(
            self.precision in ("fp32", *_AUTOCAST), "precision", "fp32, bf16 or fp16", "choose one"
        )
        check(self.ema is None or 0 < self.ema < 1, "ema", "in (0, 1) or null", "0.999 is usual")
        check(
            self.checkpoint_every >= 0, "checkpoint_every", "0 or more steps", "0 for epochs only"
        )


def learning_rate(options: Optimisation, step: int, total_steps: int) -> float:
    """The learning rate of a step: linear warm-up, then a cosine down to `min_lr * lr`.

    Args:
        options: how the network is trained.
        step: optimiser steps done so far, 0 for the first.
        total_steps: steps of the whole training.
    """
    warmup = round(options.warmup_epochs / options.epochs * total_steps)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return options.lr * (options.min_lr + (1 - options.min_lr) * cosine)


@dataclass
class Progress:
    """What one optimiser step reports."""

    step: int
    """Optimiser steps done, this one included."""
    epoch: int
    """The epoch that the step belongs to, counted from 0."""
    steps_per_epoch: int
    """Optimiser steps in one pass over the data."""
    total_steps: int
    """Optimiser steps of the whole training."""
    lr: float
    """The learning rate that the step used."""
    end_of_epoch: bool
    """Whether it was the last step of its epoch."""
    checkpoint_due: bool
    """Whether a checkpoint should be saved now; true at the end of each epoch."""
    parts: Mapping[str, Tensor] = field(repr=False)
    """The loss and its parts, scalars on the device, detached; of this worker's first share, so
    that they are the same however many workers there are."""

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The loss and its parts as numbers. Reading them waits for the device."""
        values = torch.stack([part.float() for part in self.parts.values()]).tolist()
        return dict(zip(self.parts, values, strict=True))


class Trainer:
    """Trains an objective, one optimiser step at a time.

    Args:
        objective: maps (images, labels, subnets, backward) to {"loss": scalar, further parts}, and
            calls `backward` on every loss that is to be learnt from. An
            attribute `different_per_rank = False` makes all ranks train the same subnets.
        options: how to train.
        steps_per_epoch: optimiser steps in one pass over the data.
        seed: all randomness of the loop follows from it, the step and the share.
        rank, world_size: this worker among the data-parallel ones.
        shares: into how many parts a step is divided; by default one for each worker. Worker r
            of w does the shares r, r + w, r + 2w and so on.
        device: where to train.
        wrap: applied to the objective once it is on the device; DistributedDataParallel
            in a cluster.
        label: makes of a step's labels those that are learnt, as a `Teacher` does.
        check_every: steps between checks that the loss is finite; by default 1 on the CPU
            and 50 elsewhere, where each check waits for the device.

    Raises:
        ValueError: an epoch has no step, or a worker no share.
    """

    def __init__(
        self,
        objective: nn.Module,
        options: Optimisation,
        *,
        steps_per_epoch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shares: int | None = None,
        device: torch.device | str = "cpu",
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        label: Label | None = None,
        check_every: int | None = None,
    ) -> None:
        require(steps_per_epoch >= 1, "steps_per_epoch", steps_per_epoch, "at least 1", "add data")
        self.options = options
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = options.epochs * steps_per_epoch
        self.step = 0
        self.device = torch.device(device)
        self.objective = objective.to(self.device)
        shares = shares or world_size
        require(shares >= world_size, "shares", shares, f"at least {world_size}", "lower workers")
        self._seed, self._world_size = seed, world_size
        self.shares = tuple(range(rank, shares, world_size))
        self._label = label
        self._draws_differ = getattr(objective, "different_per_rank", True)
        #: DistributedDataParallel takes the mean over workers; wanted is that over shares.
        self._weight = world_size / shares
        self._check_every = check_every or (1 if self.device.type == "cpu" else 50)
        self._spoiled = torch.zeros((), device=self.device)
        self._parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self._optimizer = self._make_optimizer()
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")
        self._ema: dict[str, Tensor] | None = None
        if options.ema is not None:
            # a mask of -inf has no mean with itself; it stays as it is
            self._ema = {
                name: t.detach().clone() for name, t in self._tensors().items()
                if t.is_floating_point() and bool(t.isfinite().all())
            }  # fmt: skip
        self._module = wrap(_Step(objective))

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.total_steps

    # -- the loop -------------------------------------------------------------------

    def run(self, batches: Batches | Sequence[Batches], draw: Draw) -> Iterator[Progress]:
        """Train to the end from wherever the trainer stands, yielding after every step.

        The objective is put into training mode before each step, so the consumer may
        evaluate between two of them.

        Args:
            batches: gives (images, labels) from a step of an epoch on; labels are class indices
                [B] or soft targets [B, C]. It must be deterministic for a restart to be exact.
                One for each of this worker's `shares`, or it alone where there is one.
            draw: gives the subnets of a step.

        Raises:
            RunError: the loss or a weight is not finite (on the CPU the step that would
                have spoilt the weights is not taken), or an epoch has too few batches.
            ValueError: there are not as many batches as this worker has shares.
        """
        sources = [batches] if callable(batches) else list(batches)
        require(
            len(sources) == len(self.shares), "the number of batches", len(sources),
            f"{len(self.shares)}, one for each share", "pass as many",
        )  # fmt: skip
        while not self.finished:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            for pairs in zip(*(source(epoch, first) for source in sources), strict=True):
                progress = self._advance(pairs, draw, epoch)
                yield progress
                if progress.end_of_epoch:
                    break
            else:
                raise RunError(
                    f"epoch {epoch} ended after {self.step - epoch * self.steps_per_epoch} steps; "
                    f"expected {self.steps_per_epoch}; the data changed while the run read them"
                )

    def _advance(self, pairs: Sequence[tuple[Tensor, Tensor]], draw: Draw, epoch: int) -> Progress:
        options, done = self.options, self.step + 1
        end_of_epoch = done % self.steps_per_epoch == 0
        due = end_of_epoch or bool(
            options.checkpoint_every and done % options.checkpoint_every == 0
        )
        lr = learning_rate(options, self.step, self.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr

        self._module.train()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            self.device.type,
            dtype=_AUTOCAST.get(options.precision),
            enabled=options.precision != "fp32",
        ):
            work = [
                self._share(share, images, labels, draw)
                for share, (images, labels) in zip(self.shares, pairs, strict=True)
            ]
            parts, losses, complete = self._module(work, self._backward)
        complete.backward()
        self._spoiled += ~torch.isfinite(losses).all()
        if due or done % self._check_every == 0:
            self._require_finite_loss(parts, epoch)

        if options.grad_clip is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters.values(), options.grad_clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.step = done
        self._update_ema()
        if due:
            self._require_finite_weights(epoch)
        return Progress(
            step=done,
            epoch=epoch,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            lr=lr,
            end_of_epoch=end_of_epoch,
            checkpoint_due=due,
            parts=parts,
        )

    def _share(self, share: int, images: Tensor, labels: Tensor, draw: Draw) -> "_Share":
        rng = random.Random(f"{self._seed}:{self.step}:{share if self._draws_differ else 0}")
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        return _Share(
            _seed_of(self._seed, self.step, share),
            images,
            self._label(images, labels) if self._label else labels,
            draw(rng, self.step / self.total_steps),
        )

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            self._scaler.scale(loss * self._weight).backward()

    def _require_finite_loss(self, parts: Mapping[str, Tensor], epoch: int) -> None:
        """All ranks come to the same verdict, so that none waits for another in vain."""
        spoiled = self._spoiled.clone()
        if self._world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.all_reduce(spoiled)
        if spoiled.item() == 0:
            return
        self._spoiled.zero_()
        values = ", ".join(f"{name}={float(part):.4g}" for name, part in parts.items())
        since = "" if self._check_every == 1 else f" or one of the {self._check_every} before it"
        raise RunError(
            f"step {self.step} of epoch {epoch}{since} has a loss that is not finite on some "
            f"worker (here: {values}); expected finite numbers; {_MENDING}; the last checkpoint "
            "is kept"
        )

    def is_finite(self) -> bool:
        """Whether the weights, and this worker's losses, are finite: what is not is no state to go
        on from. At a step with `Progress.checkpoint_due` they are. Waits for the device."""
        return not bool(self._spoiled) and all(
            bool(p.detach().isfinite().all()) for p in self._parameters.values()
        )

    def _require_finite_weights(self, epoch: int) -> None:
        """A finite loss can still have a gradient that is not: such weights are never saved."""
        finite = torch.stack([p.detach().isfinite().all() for p in self._parameters.values()])
        if not bool(finite.all()):
            name = list(self._parameters)[finite.tolist().index(False)]
            raise RunError(
                f"weight {name} is not finite after step {self.step - 1} of epoch {epoch}; "
                f"expected finite numbers; {_MENDING}; the last checkpoint is kept"
            )

    # -- the optimiser --------------------------------------------------------------

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options = self.options
        decayed: list[nn.Parameter] = []
        spared: list[nn.Parameter] = []
        for name, parameter in self._parameters.items():
            home, _, leaf = name.rpartition(".")
            owner = self.objective.get_submodule(home)
            weight = leaf == "weight" and isinstance(owner, _WEIGHTED)
            line = parameter.ndim < 2 or (parameter.numel() == max(parameter.shape) and not weight)
            bare = line or "bias" in leaf or isinstance(owner, _NORMS)
            (spared if bare else decayed).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        fused = self.device.type == "cuda"  # keeps the loss scaler's verdict on the device
        if options.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=options.lr, fused=fused)
        return torch.optim.SGD(
            groups,
            lr=options.lr,
            momentum=options.momentum,
            nesterov=options.nesterov and options.momentum > 0,
            fused=fused,
        )

    # -- the moving average ---------------------------------------------------------

    def _averaged(self) -> dict[str, Tensor]:
        """The tensors themselves of which there is an average, in its order."""
        tensors = self._tensors()
        return {name: tensors[name] for name in self._ema or ()}

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self._ema is None or self.options.ema is None:
            return
        # the first steps count less, or the average would remember the initial weights
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        live = self._averaged()
        torch._foreach_lerp_(list(self._ema.values()), list(live.values()), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights are in place inside, where `ema` is on; otherwise nothing."""
        if self._ema is None:
            yield
            return
        live = self._averaged()
        kept = {name: t.detach().clone() for name, t in live.items()}
        _assign(live, self._ema)
        try:
            yield
        finally:
            _assign(live, kept)

    # -- state ----------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers; tied ones once, under their first name."""
        seen: set[int] = set()
        found = {}
        for name, tensor in self.objective.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                found[name] = tensor
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that `load` needs to go on bit for bit.

        Returns:
            Tensors on the CPU, copied, named "model.*", "optim.<parameter>.<slot>" and
            "ema.*"; and a description that JSON can hold.
        """
        tensors = {f"model.{name}": t for name, t in self._tensors().items()}
        for name, parameter in self._parameters.items():
            for slot, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optim.{name}.{slot}"] = value
        for name, average in (self._ema or {}).items():
            tensors[f"ema.{name}"] = average
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        meta = {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "seed": self._seed,
            "scaler": self._scaler.state_dict(),
        }
        return copies, meta

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Go on from what `state` returned.

        Args:
            tensors: by name, on any device.
            meta: the description.

        Raises:
            StorageError: the state belongs to another model, optimiser, data size or seed.
        """
        for key, here in (
            ("steps_per_epoch", self.steps_per_epoch),
            ("total_steps", self.total_steps),
            ("seed", self._seed),
        ):
            if meta.get(key) != here:
                raise StorageError(
                    f"the checkpoint has {key} {meta.get(key)!r}; expected {here!r}; resume with "
                    "the configuration and the data that it was made with, or start another run"
                )
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optim": {}, "ema": {}}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = tensor
        model, ema = self._tensors(), self._ema or {}
        _require_same(groups["model"], model, "model")
        # states of before infinite masks were left out hold averages of them
        groups["ema"] = {n: t for n, t in groups["ema"].items() if n in ema or n not in model}
        _require_same(groups["ema"], ema, "ema")
        state: dict[str, dict[str, Tensor]] = {}
        for name, tensor in groups["optim"].items():
            parameter, _, slot = name.rpartition(".")
            if parameter not in self._parameters or tensor.shape not in (
                (),
                self._parameters[parameter].shape,
            ):
                raise StorageError(
                    f"the checkpoint's optimiser state {name} {list(tensor.shape)} fits no "
                    "parameter of this model; resume with the configuration it was made with"
                )
            state.setdefault(parameter, {})[slot] = tensor
        _assign(model, groups["model"])
        _assign(ema, groups["ema"])
        self._optimizer.state.clear()
        for parameter, slots in state.items():
            live = self._parameters[parameter]
            self._optimizer.state[live] = {
                slot: self._place(tensor, live) for slot, tensor in slots.items()
            }
        self._scaler.load_state_dict(dict(meta["scaler"]))
        self._spoiled.zero_()
        self.step = int(meta["step"])

    def _place(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        if tensor.shape != parameter.shape or (tensor.ndim == 0 and parameter.ndim > 0):
            # AdamW's step counter lives on the CPU unless the fused kernel reads it
            return tensor.to(self.device if self.device.type == "cuda" else "cpu", copy=True)
        return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor).detach()


def evaluate(
    forward: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Accuracy of a classifier; the caller has put it into eval mode.

    Args:
        forward: images [B, ...] -> logits [B, C].
        batches: (images, labels), labels as class indices [B].

    Returns:
        "top1" in per cent, "loss" (mean cross-entropy) and "count" (images).

    Raises:
        ValueError: there is nothing to evaluate.
    """
    correct, losses, count = [], [], 0
    with torch.no_grad():
        for images, labels in batches:
            logits = forward(images).float()
            labels = labels.to(logits.device)
            correct.append((logits.argmax(dim=1) == labels).sum())
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    require(count > 0, "the number of images", count, "at least 1", "check the data's split")
    hits = sum(torch.stack(correct).tolist())
    loss = math.fsum(torch.stack(losses).tolist())
    return {"top1": 100.0 * hits / count, "loss": loss / count, "count": count}


def _seed_of(seed: int, step: int, share: int) -> int:
    digest = hashlib.sha256(f"{seed}:{step}:{share}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def _assign(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in live.items():
        tensor.copy_(values[name])


def _require_same(found: Mapping[str, Tensor], live: Mapping[str, Tensor], what: str) -> None:
    odd = sorted(found.keys() ^ live.keys()) or [
        name for name, tensor in live.items() if tensor.shape != found[name].shape
    ]
    if odd:
        raise StorageError(
            f"the checkpoint's {what} tensors differ from this network's ({odd[0]}, {len(odd)} in "
            "all); expected the same names and shapes; resume with the configuration it was made "
            "with"
        )


@dataclass(frozen=True)
class _Share:
    """What one share of a step is done with."""

    seed: int
    images: Tensor
    labels: Tensor
    subnets: Sequence[Subnet]


class _Step(nn.Module):
    """An objective whose backward passes run within its forward, and then, as the loss for
    DistributedDataParallel, something whose backward pass visits the gradients that are there.
    It reduces them on that visit: once a step, whatever number of networks they come from."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.uses_all_parameters = getattr(objective, "uses_all_parameters", True)

    def forward(
        self, work: Sequence[_Share], backward: Callable[[Tensor], object]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The parts of the loss of the first share, the losses of all, and what to visit."""
        first, *others = work
        parts = self._learn(first, backward)
        losses = [parts["loss"]]
        # As with as many workers as shares, running statistics are those of the first alone.
        kept = [buffer.clone() for buffer in self.objective.buffers()] if others else []
        losses += [self._learn(share, backward)["loss"] for share in others]
        with torch.no_grad():
            for buffer, value in zip(self.objective.buffers() if others else (), kept, strict=True):
                buffer.copy_(value)
        learnt = [p for p in self.objective.parameters() if p.grad is not None]
        return parts, torch.stack(losses), _Visit.apply(*learnt)

    def _learn(self, share: _Share, backward: Callable[[Tensor], object]) -> dict[str, Tensor]:
        torch.manual_seed(share.seed)
        parts = self.objective(share.images, share.labels, share.subnets, backward)
        return {name: part.detach() for name, part in parts.items()}


class _Visit(torch.autograd.Function):
    """Depends on its arguments and passes no gradient to them."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.count
