"""The losses, of the main network and of the subnets of a step.

An objective gives back one loss for one backward pass. Where it gets a `backward`, it runs that on
the loss of each network as soon as it is there instead, the subnets' on views of weights and
gradients: only one network's activations are held at a time, and a subnet costs what it costs
alone [ours].

Translated from the mathematics of METHOD: the paper's [paper], its ancestors' [ST], or a
decision of this project's [ours], as marked.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..elastic.subnet import Subnet
from ..elastic.supernet import Supernet
from .checks import require


@dataclass(frozen=True, kw_only=True)
class Stimulation:
    """Options of stimulative training. Raises ValueError for a value out of range."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}  # noqa: RUF012

    subnets: int = 1
    """K, the subnets trained beside the main network in each step, 1 to 1,000 [ST]."""
    kd_weight: float = 1.0
    """Lambda, the weight of the mean distillation loss of the subnets [ours]."""
    temperature: float = 1.0
    """T of the distillation, above 0 and up to 1e6; the loss is multiplied by T squared [ours]."""
    sampler: Literal["uniform", "stratified", "sandwich", "narrowing"] = "stratified"
    """Which subnets: any; evenly spread over MACs; the smallest and random ones; or with an
    upper limit that falls from the full network to the budgets as training goes on [ours]."""
    direction: bool = False
    """Distil the direction of the logits alone, each divided by its L2 norm ("KL-") [ST]."""
    divergence: Literal["kl", "alpha"] = "kl"
    """What holds a subnet's answers to the main network's: KL, or for each image the larger of it
    and of one that punishes what the subnet alone thinks likely (`alpha_divergence`) [ours]."""
    resolutions: tuple[float, ...] = (1.0,)
    """Scales of the input's height and width for subnets, one drawn for each of them [ST]."""
    different_per_rank: bool = True
    """Whether data-parallel workers train different subnets: W times K a step [ours]."""

    def __post_init__(self) -> None:
        require(
            1 <= self.subnets <= 1000, "subnets", self.subnets, "1 to 1,000", "4 is usual"
        )  # fmt: skip
        _check_distillation(self.kd_weight, self.temperature)
        require(
            self.sampler in ("uniform", "stratified", "sandwich", "narrowing"),
            "sampler",
            self.sampler,
            "uniform, stratified, sandwich or narrowing",
            "choose one",
        )
        require(
            self.sampler != "sandwich" or self.subnets >= 2,
            "subnets",
            self.subnets,
            "at least 2 with the sandwich sampler, the smallest subnet being one of them",
            "raise it or choose another sampler",
        )
        require(
            self.divergence in _DIVERGENCES, "divergence", self.divergence, "kl or alpha",
            "choose one",
        )  # fmt: skip
        require(
            len(self.resolutions) > 0 and all(0 < scale <= 1 for scale in self.resolutions),
            "resolutions",
            self.resolutions,
            "at least one scale, each in (0, 1]",
            "(1.0,) keeps the size of the images",
        )


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Options of mutating-expansion distillation. Raises ValueError for a value out of range."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}  # noqa: RUF012

    p_start: float = 0.5
    """Probability that an axis or a dropped block is expanded, at the start [ours]."""
    p_end: float = 0.0
    """The same at the end; in between it moves linearly [ours]."""
    rungs: int = 1
    """Most expanded subnets of a step between the main network and the target; one that comes out
    equal to the network below it is left out, and 0 distils directly [ours]."""
    target_ce: float = 1.0
    """Weight of the cross-entropy on the target itself [ours]."""
    kd_weight: float = 1.0
    """Weight of each distillation loss of the ladder [ours]."""
    temperature: float = 1.0
    """T of the distillation, above 0 and up to 1e6; the loss is multiplied by T squared [ours]."""
    main: Literal["train", "drop"] = "train"
    """"train": the main network goes on learning the labels and teaches the ladder [paper].
    "drop": it is let go, and the expanded subnets learn the labels in its place [ours]."""

    def __post_init__(self) -> None:
        for name, p in (("p_start", self.p_start), ("p_end", self.p_end)):
            require(0 <= p <= 1, name, p, "a probability in [0, 1]", "0.5 is usual to start with")
        require(self.rungs >= 0, "rungs", self.rungs, "0 or more", "1 is usual")
        require(
            0 <= self.target_ce < math.inf, "target_ce", self.target_ce, "0 or more", "1 is usual"
        )
        _check_distillation(self.kd_weight, self.temperature)
        require(self.main in ("train", "drop"), "main", self.main, "train or drop", "choose one")
        require(
            self.main == "train" or self.rungs >= 1,
            "rungs",
            self.rungs,
            "at least 1 when the main network is dropped, or nobody teaches the target",
            "raise it or set main to train",
        )


def _check_distillation(kd_weight: float, temperature: float) -> None:
    require(0 <= kd_weight < math.inf, "kd_weight", kd_weight, "0 or more", "1 is usual")
    require(
        0 < temperature <= 1e6, "temperature", temperature, "a positive number up to 1e6",
        "1 is usual",
    )  # fmt: skip


#: Runs the backward pass of a loss, as `Tensor.backward` does, scaled where that is needed.
Backward = Callable[[Tensor], object]


def _learnt(loss: Tensor, backward: Backward | None) -> Tensor:
    """The loss of one network: with its graph, or, after its backward pass, its value alone."""
    if backward is None:
        return loss
    backward(loss)
    return loss.detach()


def kl_divergence(
    teacher_logits: Tensor,
    student_logits: Tensor,
    temperature: float = 1.0,
    direction: bool = False,
) -> Tensor:
    """Mean KL(softmax(teacher / T) || softmax(student / T)) * T^2; no gradient to the teacher.

    Args:
        teacher_logits: [B, C].
        student_logits: [B, C].
        temperature: T.
        direction: divide each row of logits by its L2 norm first ("KL-") [ST].

    Returns:
        A scalar of at least single precision; zero where both agree.
    """
    teacher, student = _log_probabilities(teacher_logits, student_logits, temperature, direction)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def alpha_divergence(
    teacher_logits: Tensor,
    student_logits: Tensor,
    temperature: float = 1.0,
    direction: bool = False,
    clip: float = 5.0,
) -> Tensor:
    """Mean over the images of the larger alpha-divergence of two, times T^2; no gradient to the
    teacher. With p what the teacher says and q what the student does, alpha = 1 is KL(p || q),
    large where the student leaves out what the teacher thinks likely, and alpha = -1 is
    (sum q^2 / p - 1) / 2, large where it thinks likely what the teacher does not [ours, after
    AlphaNet, Wang et al., ICML 2021].

    Args:
        teacher_logits: [B, C].
        student_logits: [B, C].
        temperature: T.
        direction: divide each row of logits by its L2 norm first, as `kl_divergence` does.
        clip: most that p / q or q / p may weigh in the gradient, and q / p in the value; AlphaNet's
            is 5, and infinity leaves both as they are.

    Returns:
        A scalar of at least single precision; zero where both agree.
    """
    teacher, student = _log_probabilities(teacher_logits, student_logits, temperature, direction)
    with torch.no_grad():
        p, q = teacher.exp(), student.exp()
        short = (teacher - student).exp().clamp(max=clip)
        over = (student - teacher).exp().clamp(max=clip)
        kl = (p * (teacher - student)).sum(1)
        other = ((q * over).sum(1) - 1) / 2
        value = torch.maximum(kl, other)
        push = q * torch.where((kl >= other)[:, None], -short, over)
    own = (push * student).sum(1)  # whose gradient is that of the larger divergence, clipped
    return (value + own - own.detach()).mean() * temperature**2


_DIVERGENCES = {"kl": kl_divergence, "alpha": alpha_divergence}


def _log_probabilities(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float, direction: bool
) -> tuple[Tensor, Tensor]:
    teacher, student = _precise(teacher_logits.detach()), _precise(student_logits)
    if direction:
        teacher, student = F.normalize(teacher, dim=1), F.normalize(student, dim=1)
    return F.log_softmax(teacher / temperature, dim=1), F.log_softmax(student / temperature, dim=1)


def _precise(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits [B, C] with class indices [B] or soft targets [B, C].

    Args:
        logits: [B, C].
        labels: int64 [B] or floating [B, C].
        label_smoothing: share of a label that is spread over all classes, in [0, 1).

    Returns:
        A scalar of at least single precision.
    """
    logits = _precise(logits)
    if labels.is_floating_point():
        labels = labels.to(logits.dtype)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


class DenseObjective(nn.Module):
    """Plain cross-entropy: the baseline, and networks of a fixed shape.

    Args:
        model: images [B, C, H, W] -> logits [B, classes].
        label_smoothing: of the cross-entropy, in [0, 1).
    """

    uses_all_parameters = True

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        subnets: Sequence[Subnet] = (),
        backward: Backward | None = None,
    ) -> dict[str, Tensor]:
        """{"loss"} of images [B, C, H, W] with labels [B] or [B, classes], learnt by `backward` if
        there is one; the subnets are not looked at."""
        ce = cross_entropy(self.model(images), labels, self.label_smoothing)
        return {"loss": _learnt(ce, backward)}


class StimulativeObjective(nn.Module):
    """CE(z_M, y) + lambda * (1/K) sum_k KL(stop_grad(z_M) || z_k) [paper, ST], or another
    divergence in the place of KL [ours].

    Args:
        net: the supernet.
        options: K is the number of subnets that the sampler draws, not read here.
        label_smoothing: of the cross-entropy.
    """

    uses_all_parameters = True

    def __init__(self, net: Supernet, options: Stimulation, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.net = net
        self.options = options
        self.label_smoothing = label_smoothing
        self.different_per_rank = options.different_per_rank

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        subnets: Sequence[Subnet],
        backward: Backward | None = None,
    ) -> dict[str, Tensor]:
        """{"loss", "ce": of the main network, "kd": mean over the subnets}, scalars, of images
        [B, C, H, W] with labels [B] or [B, classes]; learnt by `backward`, if there is one, network
        by network."""
        options, direct = self.options, backward is not None
        measure = _DIVERGENCES[options.divergence]
        main = self.net(images)
        ce = cross_entropy(main, labels, self.label_smoothing)
        loss, kd = _learnt(ce, backward), ce.new_zeros(())
        for subnet in subnets:
            logits = self.net(self._scaled(images), subnet, direct=direct)
            divergence = measure(main, logits, options.temperature, options.direction)
            divergence = divergence / len(subnets)
            loss = loss + _learnt(options.kd_weight * divergence, backward)
            kd = kd + divergence.detach()
        return {"loss": loss, "ce": ce.detach(), "kd": kd}

    def _scaled(self, images: Tensor) -> Tensor:
        """The images at a scale drawn from torch's CPU generator, which the trainer seeds."""
        scales = self.options.resolutions
        drawn = int(torch.randint(len(scales), ())) if len(scales) > 1 else 0
        return scaled(images, scales[drawn])


def scaled(images: Tensor, scale: float) -> Tensor:
    """Images [B, C, H, W] with height and width times a scale in (0, 1] [ST]."""
    if scale == 1.0:
        return images
    size = [max(1, round(extent * scale)) for extent in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


class ExpansionObjective(nn.Module):
    """CE(z_M, y) + KL(z_M || z_e) + KL(z_e || z_a*), teachers without gradient [paper].

    The subnets of a step are the expanded ones, from large to small; each learns from the
    one before it and the target from the last. With `options.main == "drop"` there is no
    main network: the expanded subnets learn the labels (their mean cross-entropy takes the
    place of the main network's), and what lies outside the largest of them gets no gradient.
    In a step without expanded subnets the target stands in for them: its cross-entropy has weight
    1 + target_ce, as it would with an expanded subnet equal to it.

    Args:
        net: the supernet.
        target: the subnet that will be extracted.
        options: weights of the ladder.
        label_smoothing: of the cross-entropies.
    """

    def __init__(
        self, net: Supernet, target: Subnet, options: Expansion, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.net = net
        self.target = target
        self.options = options
        self.label_smoothing = label_smoothing
        self.uses_all_parameters = options.main == "train"

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        subnets: Sequence[Subnet],
        backward: Backward | None = None,
    ) -> dict[str, Tensor]:
        """{"loss", "ce": of the teacher(s), "ce_target", "kd": sum over the expanded subnets,
        "kd_target"}, scalars, of images [B, C, H, W] with labels [B] or [B, classes]; learnt by
        `backward`, if there is one, network by network.
        """
        options, direct = self.options, backward is not None
        with_main = options.main == "train"
        if not with_main and not subnets:
            logits = self.net(images, self.target, direct=direct)
            ce = cross_entropy(logits, labels, self.label_smoothing)
            loss = _learnt((1 + options.target_ce) * ce, backward)
            ce, none = ce.detach(), ce.new_zeros(())
            return {"loss": loss, "ce": ce, "kd": none, "ce_target": ce, "kd_target": none}
        first, *rungs = [None, *subnets] if with_main else subnets
        learners = 1 if with_main else len(subnets)
        teacher = self.net(images, first)
        ce = cross_entropy(teacher, labels, self.label_smoothing) / learners
        loss, parts = _learnt(ce, backward), {"ce": ce.detach()}
        parts["kd"] = ce.new_zeros(())
        for subnet in rungs:
            logits = self.net(images, subnet, direct=direct)
            kd = kl_divergence(teacher, logits, options.temperature)
            parts["kd"] = parts["kd"] + kd.detach()
            own = options.kd_weight * kd
            if not with_main:
                ce = cross_entropy(logits, labels, self.label_smoothing) / learners
                parts["ce"] = parts["ce"] + ce.detach()
                own = own + ce
            loss, teacher = loss + _learnt(own, backward), logits
        logits = self.net(images, self.target, direct=direct)
        ce = cross_entropy(logits, labels, self.label_smoothing)
        kd = kl_divergence(teacher, logits, options.temperature)
        loss = loss + _learnt(options.target_ce * ce + options.kd_weight * kd, backward)
        return {"loss": loss, **parts, "ce_target": ce.detach(), "kd_target": kd.detach()}
