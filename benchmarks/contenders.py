"""The methods that `accuracy.py` compares: ours, ours with a part taken out, and everyone else's.

Each takes the bench, the budget and what it may spend, and returns a trained network."""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from bench import STEP, Bench, macs_of
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from stp_ray.elastic import Budget, SearchSpace, Subnet, Supernet, importance
from stp_ray.method import (
    DenseObjective,
    Expansion,
    ExpansionObjective,
    Exploration,
    Explorer,
    Stimulation,
    StimulativeObjective,
    Teacher,
    calibrate,
    evaluate,
    ladder,
    reference_logits,
    relative_sparsity,
    sampler,
    score,
    tuned_score,
)
from stp_ray.method.scoring import TUNING_BATCH
from stp_ray.method.training import Draw


@dataclass(frozen=True)
class Limit:
    """What a method may spend: epochs, or MACs of training where `macs` is given."""

    epochs: int
    macs: int | None = None

    def left(self, per_epoch: int, *, epochs: int = 0, macs: int = 0) -> int:
        """Epochs at this price, after so many epochs and MACs; at least one."""
        if self.macs is None:
            return max(1, self.epochs - epochs)
        return max(1, (self.macs - macs) // per_epoch)


@dataclass
class Trained:
    """A network at the end of its training."""

    network: nn.Module
    spent: int
    """MACs of training, forward and backward, over everything that led to it."""
    epochs: int
    subnet: Subnet | None = None
    notes: dict[str, Any] = field(default_factory=dict)


# -- dense and from scratch -----------------------------------------------------------


def dense(bench: Bench, budget: float, limit: Limit) -> Trained:
    """The dense network."""
    epochs = limit.left(_epoch(bench, STEP * bench.full_macs))
    model, spent = _dense(bench, epochs)
    return Trained(model, spent, epochs)


def _dense(bench: Bench, epochs: int) -> tuple[nn.Module, int]:
    """The dense network after a whole schedule of so many epochs, and its price."""

    found = _dense_history(bench, epochs)
    model = bench.ready(bench.fresh())
    model.load_state_dict(found["weights"][-1])
    return model, found["spent"]


def _dense_history(bench: Bench, epochs: int) -> dict[str, Any]:
    """Its weights at first and after each epoch, and the price."""

    def make() -> dict[str, Any]:
        model = bench.fresh()
        weights = [_copied(model)]
        spent = bench.train(
            DenseObjective(model), epochs, macs=STEP * bench.full_macs,
            at_epoch=lambda _: weights.append(_copied(model)),
        )  # fmt: skip
        return {"weights": weights, "spent": spent}

    return bench.kept(f"dense-{epochs}", make)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    """The weights and statistics as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def twice(
    bench: Bench, of: Any, limit: Limit, *, make: Callable[[Bench, Any, Limit], Trained]
) -> Trained:
    """What `make` does, for twice the epochs: as many as what starts as the teacher has seen."""
    return make(bench, of, replace(limit, epochs=2 * limit.epochs))


def dense_distilled(bench: Bench, budget: float, limit: Limit) -> Trained:
    """The dense network once more, with a finished one as its teacher: what our main network,
    which is taught so, has to beat."""
    return scratch_distilled(bench, bench.supernet().space.full, limit)


def scratch(bench: Bench, shape: Subnet, limit: Limit) -> Trained:
    """A shape from scratch ("Scratch-E" at equal epochs, "Scratch-B" at equal MACs, Liu et al.
    2019)."""
    model = _renewed(bench, shape)
    cost = STEP * macs_of(model, bench.example)
    epochs = limit.left(_epoch(bench, cost))
    return Trained(model, bench.train(DenseObjective(model), epochs, macs=cost), epochs, shape)


def scratch_distilled(bench: Bench, shape: Subnet, limit: Limit) -> Trained:
    """A shape from scratch, with the dense network as its teacher. At equal epochs the teacher's
    training is a gift; at equal MACs it is paid for."""
    model = _renewed(bench, shape)
    teacher, paid = _dense(bench, bench.protocol.epochs)
    cost = STEP * macs_of(model, bench.example) + bench.full_macs
    epochs = limit.left(_epoch(bench, cost), macs=paid)
    spent = bench.train(DenseObjective(model), epochs, macs=cost, label=Teacher(teacher))
    return Trained(model, paid + spent, epochs, shape)


#: Shapes that nobody has to find.
Unfound = Literal["uniform", "filled", "random"]


def given(
    bench: Bench,
    budget: float,
    limit: Limit,
    *,
    how: Unfound,
    make: Callable[[Bench, Subnet, Limit], Trained],
) -> Trained:
    """A shape that nobody has to find, trained as `make` does."""
    return make(bench, unfound(bench, bench.supernet().space, budget, how), limit)


def unfound(bench: Bench, space: SearchSpace, budget: float, how: Unfound) -> Subnet:
    """The shape that keeps the budget with all layers equally wide, the same with what rounding
    leaves of the budget filled, or this seed's random one."""
    wanted = Budget(macs=budget)
    if how == "random":
        return space.sample(random.Random(bench.seed), wanted)
    uniform = space.uniform_within(wanted)
    return uniform if how == "uniform" else space.fill(uniform, wanted)


def _renewed(bench: Bench, shape: Subnet) -> nn.Module:
    """A shape with weights drawn for its own widths, as the dense model's are for its."""
    return bench.redrawn(bench.supernet().extract(shape))


def _epoch(bench: Bench, macs: int) -> int:
    """MACs of an epoch at so many for one image."""
    batch = bench.protocol.batch_size
    return bench.images.count("train") // batch * batch * macs


# -- Torch-Pruning ----------------------------------------------------------------------


def torch_pruning(
    bench: Bench,
    budget: float,
    limit: Limit,
    *,
    sparse: bool = False,
    even: bool = False,
    lean: bool = False,
    finished: bool = False,
) -> Trained:
    """Dense training for half of the epochs, group-norm pruning (DepGraph), fine-tuning with
    distillation for the other half. `sparse`: the last half of the dense training is under the
    pruner's group sparsity; `even`: all layers lose the same share instead of competing; `lean`:
    one dense epoch and no teacher, so that equal MACs buy the most epochs; `finished`: what is
    pruned is the teacher, whose training is a gift at equal epochs, and tuning has them all."""
    whole = bench.protocol.epochs
    before = whole if finished else 1 if lean else whole // 2
    own = 0 if finished and limit.macs is None else before
    if sparse:
        model, paid = _made_sparse(bench, before)
    else:
        model, paid = _dense(bench, before)
    if lean:
        teacher, gift = None, 0
    elif limit.macs is None and not finished:
        teacher, gift = _dense(bench, whole)
    else:  # its own past: the finished teacher, or at equal MACs, which know no gifts, what is paid
        teacher, gift = copy.deepcopy(model), 0
    pruner = _pruner(
        bench, model, global_pruning=not even, pruning_ratio=1.0, max_pruning_ratio=0.95,
        iterative_steps=100,
    )  # fmt: skip
    while macs_of(model, bench.example) > budget * bench.full_macs:
        if pruner.current_step >= pruner.iterative_steps:
            raise RuntimeError(f"Torch-Pruning cannot reach {budget} of the MACs")
        pruner.step()
        if isinstance(model, VisionTransformer):
            model.hidden_dim = model.conv_proj.out_channels  # which its forward pass reads
    for parameter in model.parameters():
        parameter.grad = None
    model.train().requires_grad_(True)
    label = Teacher(teacher) if teacher is not None else None
    cost = STEP * macs_of(model, bench.example) + (label is not None) * bench.full_macs
    epochs = limit.left(_epoch(bench, cost), epochs=own, macs=paid)
    spent = bench.train(DenseObjective(model), epochs, macs=cost, label=label, after=before)
    return Trained(model, gift + paid + spent, own + epochs)


def _pruner(bench: Bench, model: nn.Module, **options: Any) -> Any:
    """Theirs, which leaves the classifier's outputs alone, and of heads prunes the size."""
    import torch_pruning as tp

    layers = list(model.modules())
    heads = [layer.num_heads for layer in layers if isinstance(layer, nn.MultiheadAttention)]
    return tp.pruner.GroupNormPruner(
        model, bench.example.to(bench.images.device),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        ignored_layers=[[layer for layer in layers if isinstance(layer, nn.Linear)][-1]],
        round_to=heads[0] if heads else None, **options,
    )  # fmt: skip


def _made_sparse(bench: Bench, epochs: int) -> tuple[nn.Module, int]:
    plain = epochs // 2
    model, paid = _dense(bench, plain)
    pruner = _pruner(bench, model, reg=5e-4, global_pruning=True)
    pruner.update_regularizer()
    spent = bench.train(
        DenseObjective(model), epochs - plain, macs=STEP * bench.full_macs,
        before_step=lambda: pruner.regularize(model), warm=False, lr=(0.5, 0.0), after=plain,
    )  # fmt: skip
    return model, paid + spent


# -- suppressed sparsification ------------------------------------------------------------


def group_lasso(bench: Bench, budget: float, limit: Limit, *, strength: float = 1e-2) -> Trained:
    """Dense training under a group lasso on the axes of our space for half of the epochs, pruning
    of the units with the smallest norms, fine-tuning with distillation for the other half."""
    whole, net = bench.protocol.epochs, bench.supernet()
    before = whole // 2

    def make() -> dict[str, Any]:
        weights = [_copied(net.model)]
        spent = bench.train(
            DenseObjective(net), before, macs=STEP * bench.full_macs,
            at_epoch=lambda _: weights.append(_copied(net.model)),
            before_step=lambda: suppress(net, strength),
        )  # fmt: skip
        return {"weights": weights, "spent": spent}

    found = bench.kept(f"group-lasso-{before}-{strength}", make)
    net.model.load_state_dict(found["weights"][-1])
    net.eval()
    top1 = bench.top1(net)
    teacher, gift = _dense(bench, whole) if limit.macs is None else (copy.deepcopy(net), 0)
    scores = importance(net)
    target = by_magnitude(net, scores, budget)
    sparsity = []
    for weights in found["weights"]:
        net.model.load_state_dict(weights)
        net.rank(scores)
        sparsity.append(relative_sparsity(net, target))
    small = net.extract(target)
    cost = STEP * net.cost(target).macs + bench.full_macs
    epochs = limit.left(_epoch(bench, cost), epochs=before, macs=found["spent"])
    spent = bench.train(
        DenseObjective(small), epochs, macs=cost, label=Teacher(teacher), after=before
    )
    return Trained(
        small, gift + found["spent"] + spent, before + epochs, target,
        {"before_pruning_top1": top1, "sparsity": sparsity},
    )  # fmt: skip


@torch.no_grad()
def suppress(net: Supernet, strength: float) -> None:
    """Add the gradient of strength * (sum over the units of all axes of their L2 norms)."""
    push = {axis: strength / s.sqrt().clamp_min(1e-8) for axis, s in importance(net).items()}
    parameters = dict(net.model.named_parameters())
    for name, dims in net.segments.items():
        weight = parameters.get(name)
        if weight is None or weight.grad is None:
            continue
        for dim, segments in enumerate(dims):
            for start, length, axis, factor in segments or ():
                if axis is not None:
                    place = [slice(None)] * dim + [slice(start, start + length)]
                    scale = push[axis].repeat_interleave(factor)
                    scale = scale.view(-1, *[1] * (weight.dim() - dim - 1))
                    weight.grad[tuple(place)].add_(weight[tuple(place)] * scale)


def by_magnitude(net: Supernet, scores: dict[str, Tensor], budget: float) -> Subnet:
    """Each axis keeps its units above one threshold, relative to the axis's own mean."""
    relative = {axis: score.sqrt() / score.sqrt().mean() for axis, score in scores.items()}
    limit, full = Budget(macs=budget), net.cost()
    for threshold in sorted({float(v) for values in relative.values() for v in values}):
        widths = {
            axis.name: axis.nearest(int((relative[axis.name] >= threshold).sum()))
            for axis in net.space.axes
        }
        subnet = net.space.canonical(Subnet(widths))
        if limit.admits(net.cost(subnet), of=full):
            return subnet
    return net.space.uniform_within(limit)


# -- slimmable training ----------------------------------------------------------------------


def slimmable(bench: Bench, budget: float, limit: Limit, *, widths: int = 4) -> Trained:
    """Universally slimmable training (Yu and Huang, ICCV 2019): in each step the full width learns
    the labels, and the narrowest and random ones learn from it ("sandwich rule", "in-place
    distillation"). All layers have the same width; the one that keeps the budget is cut out, with
    BatchNorm statistics of its own. The narrowest is that of the smallest budget."""
    net, count = bench.supernet(), bench.protocol.calibration_images
    space = net.space
    least = Budget(macs=min(bench.protocol.budgets))
    narrowest, full = space.uniform_within(least), space.cost()
    target = space.uniform_within(Budget(macs=budget))
    calibration = count * space.cost(target).macs
    ratios = [step / 200 for step in range(201)]
    kept = [r for r in ratios if least.admits(space.cost(space.uniform(r)), of=full)]
    lowest = max(kept, default=0.0)

    def draw(rng: random.Random, progress: float) -> list[Subnet]:
        between = [space.uniform(rng.uniform(lowest, 1.0)) for _ in range(widths - 2)]
        return [narrowest, *between]

    def price(subnet: Subnet) -> int:
        return STEP * space.cost(subnet).macs

    per_image = STEP * bench.full_macs + _mean(draw, price)
    epochs = limit.left(_epoch(bench, per_image), macs=calibration)
    # the losses of all widths are added up
    options = Stimulation(sampler="uniform", subnets=widths - 1, kd_weight=widths - 1)

    def make() -> dict[str, Any]:
        spent = bench.train(
            StimulativeObjective(net, options), epochs, macs=STEP * bench.full_macs, draw=draw,
            price=price,
        )  # fmt: skip
        return {"weights": net.model.state_dict(), "spent": spent}

    found = bench.kept(f"slimmable-{epochs}-{widths}", make)
    net.model.load_state_dict(found["weights"])
    small = net.extract(target, calibrate(net, target, bench.images.calibration(bench.seed, count)))
    main = bench.top1(net.eval())
    return Trained(small, found["spent"] + calibration, epochs, target, {"main_top1": main})


# -- STP --------------------------------------------------------------------------------


#: Between the seeds of two searches or trainings of one supernet: more than there are seeds.
APART = 100


@dataclass(frozen=True, kw_only=True)
class Stp:
    """STP and its options; the defaults are what is called STP in the results."""

    share: float = 0.5
    """Share of the epochs that goes to stimulative training."""
    stimulation: Stimulation = field(default_factory=lambda: Stimulation(sampler="narrowing"))
    target: Literal["explored"] | Unfound | Subnet = "explored"
    tuning_steps: int = 0
    """Steps of distillation that a promoted candidate gets before it is scored again."""
    tuning_images: int = 512
    """Images that they learn from."""
    tuning_lr: float = 0.5
    """The learning rate that they start with, as a share of the protocol's."""
    finalists: int = 0
    """The best of each budget, that are scored once more after more steps."""
    search: int = 0
    """Which of several searches of one supernet, which differ in what they draw."""
    training: int = 0
    """Which of several second phases of one supernet, which differ in the order of the images,
    their augmentation and what the ladder draws."""
    tried_epochs: int = 0
    """Passes over the images that each of a few candidates, the finalists where there are any, has
    on the labels, by itself, before it is scored again, by its cross-entropy; the search is then
    for one budget alone."""
    expansion: Expansion = field(default_factory=Expansion)
    turn: float = 0.5
    """The learning rate between the phases, as a share of the protocol's: one fall over both."""
    restart: float | None = None
    """The learning rate that the second phase warms up to instead of going on from `turn`."""
    decay: float | None = None
    """Weight decay in both phases; None for the protocol's."""
    taught: bool = False
    """Whether the finished dense network says half of every label, in both phases: the gift that
    distillation from scratch gets."""
    to_the_end: bool = True
    """Whether it does so in the second phase too, where each step costs a pass of it."""
    started: bool = False
    """Whether the supernet starts as that network, units in the order of their weights' norms,
    and not from scratch: as much of a gift."""

    def first(self, epochs: int) -> int:
        """How many of the epochs are stimulative."""
        return max(1, round(self.share * epochs))

    @property
    def saves(self) -> bool:
        """Whether an epoch costs less than one of STP's, so that equal MACs buy more of them."""
        return self.expansion.main == "drop"

    def __call__(self, bench: Bench, budget: float, limit: Limit) -> Trained:
        first = self.first(bench.protocol.epochs)
        net, paid, weights = self.stimulated(bench)
        target, searched = self.shape(bench, net, budget)
        cost = net.cost(target).macs
        full = bench.full_macs if self.expansion.main == "train" else 0
        objective = ExpansionObjective(net, target, self.expansion)
        gift = self.taught or self.started
        teacher_cost = _dense(bench, bench.protocol.epochs)[1] if gift else 0
        sparsity = [sparsity_of(net, kept, target) for kept in weights]
        notes: dict[str, Any] = {"sparsity": sparsity}
        if self.taught and not self.started:  # the same slice's while the teacher learned
            history = _dense_history(bench, bench.protocol.epochs)["weights"]
            notes["dense_sparsity"] = [sparsity_of(net, kept, target) for kept in history]
        draw = ladder(net.space, target, self.expansion)

        def price(subnet: Subnet) -> int:
            return STEP * net.space.cost(subnet).macs

        teacher = self._teacher(bench) if self.to_the_end else None
        fixed = STEP * (full + cost) + (teacher is not None) * bench.full_macs
        per_image = fixed + _mean(draw, price)
        count = bench.protocol.calibration_images
        calibration = count * cost
        before = teacher_cost + paid + searched
        rest = limit.left(_epoch(bench, per_image), epochs=first, macs=before + calibration)
        spent = bench.reseeded(APART * self.training).train(
            objective, rest, macs=fixed, draw=draw, price=price, label=teacher,
            lr=(self.restart or self.turn, 0.0), warm=self.restart is not None, decay=self.decay,
            after=self.before(bench) + first,
            at_epoch=lambda _: sparsity.append(relative_sparsity(net, target)),
        )  # fmt: skip
        small = net.extract(
            target, calibrate(net, target, bench.images.calibration(bench.seed, count))
        )
        if limit.macs is not None:
            del sparsity[1:-1]  # no plot draws the course over hundreds of epochs
        net.eval()
        notes["main_top1"] = bench.top1(net) if full else None
        return Trained(small, before + spent + calibration, first + rest, target, notes)

    def found(self, bench: Bench, budget: float) -> Subnet:
        """The shape that is pruned to."""
        return self.shape(bench, self.stimulated(bench)[0], budget)[0]

    def stimulated(self, bench: Bench) -> tuple[Supernet, int, list[dict[str, Tensor]]]:
        """The supernet after its training, the price, and its weights after each epoch."""
        net, epochs = bench.supernet(), self.first(bench.protocol.epochs)
        if self.started:
            net.model.load_state_dict(_dense(bench, bench.protocol.epochs)[0].state_dict())
            net.rank(importance(net))
        budgets = [Budget(macs=budget) for budget in bench.protocol.budgets]

        def make() -> dict[str, Any]:
            epochs_seen = [_copied(net.model)]
            spent = bench.train(
                StimulativeObjective(net, self.stimulation), epochs, label=self._teacher(bench),
                macs=(STEP + self.taught) * bench.full_macs,
                draw=sampler(self.stimulation, net.space, budgets),
                price=lambda subnet: STEP * net.space.cost(subnet).macs,
                lr=(1.0, self.turn), after=self.before(bench), decay=self.decay,
                at_epoch=lambda _: epochs_seen.append(_copied(net.model)),
            )  # fmt: skip
            return {"weights": epochs_seen, "spent": spent}

        found = bench.kept(f"supernet-{self._name(epochs)}", make)
        net.model.load_state_dict(found["weights"][-1])
        return net, found["spent"], found["weights"]

    def before(self, bench: Bench) -> int:
        """The epochs that the supernet's first weights have seen."""
        return bench.protocol.epochs if self.started else 0

    def _teacher(self, bench: Bench) -> Teacher | None:
        return Teacher(_dense(bench, bench.protocol.epochs)[0]) if self.taught else None

    def _name(self, epochs: int) -> str:
        s, taught = self.stimulation, "-taught" * self.taught
        options = f"{s.sampler}-{s.subnets}-{s.kd_weight}-{s.temperature}"
        more = "-direction" * s.direction + "-alpha" * (s.divergence == "alpha")
        more += f"-{s.resolutions}" * (s.resolutions != (1.0,))
        more += f"-decay-{self.decay}" * (self.decay is not None)
        return f"{epochs}-{self.turn}-{options}{more}{taught}{'-started' * self.started}"

    def shape(self, bench: Bench, net: Supernet, budget: float) -> tuple[Subnet, int]:
        """The shape to prune to, and what finding it cost: one search for the budgets that the
        supernet was trained for, one for the others; where shapes are tried, one for each."""
        space = net.space
        if isinstance(self.target, Subnet):
            return self.target, 0
        if self.target != "explored":
            return unfound(bench, space, budget, self.target), 0

        main = budget in bench.protocol.budgets
        together = bench.protocol.budgets if main else bench.protocol.also
        together = (budget,) if self.tried_epochs else together

        def make() -> dict[str, Any]:
            options = self._exploration(bench)
            budgets = [Budget(macs=each) for each in together]
            held = bench.images.count("holdout")
            seed = bench.seed + APART * self.search
            explorer = Explorer(space, budgets, options, seed, held_out=held)
            judge = Judge(bench, net, options.tuning_images, self.tuning_lr)
            known = held + bool(self.tuning_steps) * options.tuning_images
            spent = known * bench.full_macs
            while candidates := explorer.ask():
                scores = {}
                for candidate in candidates:
                    subnet, count = candidate.subnet, candidate.images or held
                    looks = count + options.calibration_images
                    if self.tried_epochs and candidate.steps > self.tuning_steps:
                        scores[candidate.key], paid = judge.tried(
                            subnet, self.tried_epochs,
                            after=self.before(bench) + self.first(bench.protocol.epochs),
                        )  # fmt: skip
                        spent += paid
                    else:
                        scores[candidate.key] = judge(subnet, count, candidate.steps)
                        looks += STEP * TUNING_BATCH * candidate.steps
                    spent += looks * space.cost(subnet).macs
                explorer.tell(scores)
            found = {str(each): explorer.best(Budget(macs=each)) for each in together}
            return {
                "targets": {label: scored.subnet.to_json() for label, scored in found.items()},
                "scores": {label: scored.score for label, scored in found.items()},
                "spent": spent,
            }

        tuned = (self.tuning_steps, self.tuning_images, self.tuning_lr, self.finalists)
        how = f"-tuned-{'-'.join(map(str, tuned))}" * bool(self.tuning_steps)
        how += f"-tried-{self.tried_epochs}-{budget}" * bool(self.tried_epochs)
        how += "-also" * (not main) + f"-search-{self.search}" * (self.search > 0)
        name = f"explored-{self._name(self.first(bench.protocol.epochs))}{how}"
        found = bench.kept(name, make)
        return Subnet.from_json(found["targets"][str(budget)]), found["spent"]

    def _exploration(self, bench: Bench) -> Exploration:
        options = replace(bench.protocol.exploration, finalists=self.finalists)
        if self.tuning_steps or not self.tried_epochs:
            return replace(
                options, tuning_steps=self.tuning_steps, tuning_images=self.tuning_images
            )
        # Few, of two generations, for that is dear. They are tried instead of tuned: any number of
        # steps makes the explorer ask for them again.
        return replace(options, generations=2, promote=1 / 8, tuning_steps=1)


class Judge:
    """Scores slices of a supernet as the search does.

    Args:
        bench: the images and the optimiser.
        net: the supernet.
        learnt: images that tuning learns from.
        lr: what it starts with, as a share of the protocol's.
    """

    def __init__(self, bench: Bench, net: Supernet, learnt: int, lr: float) -> None:
        self._bench, self._net, self._count, self._lr = bench, net, learnt, lr
        count = bench.protocol.exploration.calibration_images
        self._calibration = list(bench.images.calibration(bench.seed, count))
        self._logits = reference_logits(net, (x for x, _ in bench.images.plain("holdout")))

    def _learnt(self) -> Iterator[Tensor]:
        return self._bench.images.calibration(self._bench.seed, self._count)

    @cached_property
    def _known(self) -> Tensor:
        """What the main network says of the images that tuning learns from."""
        return reference_logits(self._net, self._learnt())

    def __call__(self, subnet: Subnet, images: int, steps: int) -> float:
        """The score on so many held-out images, after so many steps of distillation."""
        bench, net, logits = self._bench, self._net, self._logits[:images]
        held_out = (x for x, _ in bench.images.plain("holdout", images))
        if not steps:
            return score(net, subnet, self._calibration, held_out, logits)
        return tuned_score(
            net, subnet, self._calibration, self._learnt, self._known, held_out, logits,
            steps=steps, options=bench.optimisation(bench.protocol.epochs, lr=self._lr),
            seed=bench.seed,
        )  # fmt: skip

    def tried(self, subnet: Subnet, epochs: int, after: int) -> tuple[float, int]:
        """The cross-entropy on the held-out images after a copy of the slice has been trained on
        the labels for so many epochs, which come `after` the supernet's, and the price."""
        bench, net = self._bench, self._net
        alone = net.extract(subnet, calibrate(net, subnet, self._calibration))
        cost = STEP * net.cost(subnet).macs
        spent = bench.train(DenseObjective(alone), epochs, macs=cost, warm=False, after=after)
        return evaluate(alone.eval(), bench.images.plain("holdout"))["loss"], spent


def _mean(draw: Draw, price: Callable[[Subnet], int], looks: int = 256) -> int:
    """The price of what is drawn in a step, averaged over the course of a training."""
    rng = random.Random(0)
    drawn = [draw(rng, look / looks) for look in range(looks)]
    return sum(price(subnet) for subnets in drawn for subnet in subnets) // looks


def sparsity_of(net: Supernet, weights: dict[str, Tensor], target: Subnet) -> dict[str, float]:
    """The relative sparsity of other weights than the network's own, which it gets back."""
    own = _copied(net.model)
    net.model.load_state_dict(weights)
    found = relative_sparsity(net, target)
    net.model.load_state_dict(own)
    return found


STP = Stp()
DIRECT = replace(STP.expansion, rungs=0)
FOUR = replace(STP.stimulation, subnets=4)
BEST = replace(STP, taught=True, stimulation=FOUR)

#: An epoch of the supernet, the search, then the found slice alone on the labels.
ALONE = replace(
    STP, share=1 / 12, turn=0.95, expansion=replace(STP.expansion, main="drop", p_start=0.0)
)

#: The names of forms of STP that others are compared with, or measured by.
OURS = "stp"
TAUGHT = f"{OURS}, taught, four subnets a step"
QUARTER = f"{TAUGHT}, a quarter, restart"
ALONE_FINALS = f"{OURS}, target alone, finals"
TRIED = f"{OURS}, target alone, shapes tried"
TRIED_FINALS = f"{OURS}, target alone, finals tried"
TUNED = f"{QUARTER}, tuned scores"
STARTED = f"{TUNED}, of the teacher"
STARTED_FINALS = f"{QUARTER}, finals, of the teacher"
#: More searches of a supernet of the same seed.
AGAIN = {f"{STARTED_FINALS}, second search": 1, f"{STARTED_FINALS}, third search": 2}
#: Widths that nobody has to find, from the same supernets.
FILLED = f"{STARTED}, filled uniform widths"
UNDECAYED = f"{QUARTER}, no weight decay"
#: The sparsification that shrinks what it drops.
PENALTY = "group lasso"
#: What someone else makes of the same start.
THEIRS = "torch-pruning, even, of the teacher"
#: As many epochs as its weights have seen, for a dense network and for its own shape from scratch.
DENSE_TWICE = "dense, twice the epochs"
SCRATCH_TWICE = "scratch + distillation, shape from the teacher, twice the epochs"
FINALS_TWICE = "scratch + distillation, shape of finals, twice the epochs"
TWICE = (DENSE_TWICE, SCRATCH_TWICE, FINALS_TWICE)
#: Methods whose weights see more epochs than those of others.
LONGER = (STARTED, STARTED_FINALS, THEIRS, *TWICE)
#: The ladder's loss as the paper has it: what is pruned to sees no label.
PLAIN = f"{OURS}, target without labels"
FORMS = {OURS: STP, TAUGHT: BEST, QUARTER: replace(BEST, share=1 / 4, restart=1.0)}
#: What can be taken out of each of them, to see what it is worth.
PARTS: dict[str, dict[str, Any]] = {
    "uniform widths": {"target": "uniform"},
    "filled uniform widths": {"target": "filled"},
    "random subnet": {"target": "random"},
    "no expansion": {"expansion": DIRECT},
}

#: Open options of the method, each tried by itself on the last of the forms.
OPTIONS: dict[str, dict[str, Any]] = {
    "uniform sampler": {"stimulation": replace(FOUR, sampler="uniform")},
    "stratified sampler": {"stimulation": replace(FOUR, sampler="stratified")},
    "sandwich sampler": {"stimulation": replace(FOUR, sampler="sandwich")},
    "one subnet a step": {"stimulation": STP.stimulation},
    "subnets weigh double": {"stimulation": replace(FOUR, kd_weight=2.0)},
    "temperature 2 at first": {"stimulation": replace(FOUR, temperature=2.0)},
    "direction of logits": {"stimulation": replace(FOUR, direction=True)},
    "alpha-divergence": {"stimulation": replace(FOUR, divergence="alpha")},
    # priced as if all images were of full size
    "smaller images too": {"stimulation": replace(FOUR, resolutions=(0.75, 1.0))},
    "no weight decay": {"decay": 0.0},
    "tuned scores": {"tuning_steps": 50},
    "finals": {"tuning_steps": 25, "tuning_images": 4096, "tuning_lr": 1.0, "finalists": 3},
    "two rungs": {"expansion": replace(STP.expansion, rungs=2)},
    "expansion to the end": {"expansion": replace(STP.expansion, p_end=0.5)},
    "wide expansion": {"expansion": replace(STP.expansion, p_start=1.0)},
    "target without labels": {"expansion": replace(STP.expansion, target_ce=0.0)},
    "temperature 2 in the end": {"expansion": replace(STP.expansion, temperature=2.0)},
}

#: Methods that prune nothing.
WHOLE = ("dense", DENSE_TWICE, "dense + distillation")
#: What wins on fresh seeds.
FROM_TEACHER = replace(FORMS[QUARTER], **OPTIONS["tuned scores"], started=True)
FINALS_FROM_TEACHER = replace(FORMS[QUARTER], **OPTIONS["finals"], started=True)

#: Methods with a shape of their own: (bench, budget, limit) -> `Trained`.
OWN_SHAPE: dict[str, Any] = {
    "dense": dense,
    DENSE_TWICE: partial(twice, make=dense),
    "dense + distillation": dense_distilled,
    "scratch at uniform widths": partial(given, how="uniform", make=scratch),
    "scratch at a random shape": partial(given, how="random", make=scratch),
    "scratch + distillation at uniform widths": partial(
        given, how="uniform", make=scratch_distilled
    ),
    **FORMS,
    **{
        f"{name}, {part}": replace(form, **without)
        for name, form in FORMS.items()
        for part, without in PARTS.items()
    },
    **{f"{QUARTER}, {option}": replace(FORMS[QUARTER], **to) for option, to in OPTIONS.items()},
    f"{TUNED}, no expansion": replace(
        FORMS[QUARTER], **OPTIONS["tuned scores"], **PARTS["no expansion"]
    ),
    STARTED: FROM_TEACHER,
    STARTED_FINALS: FINALS_FROM_TEACHER,
    **{f"{STARTED}, {part}": replace(FROM_TEACHER, **without) for part, without in PARTS.items()},
    f"{STARTED}, wide expansion": replace(FROM_TEACHER, **OPTIONS["wide expansion"]),
    f"{STARTED_FINALS}, no expansion": replace(FINALS_FROM_TEACHER, **PARTS["no expansion"]),
    **{name: replace(FINALS_FROM_TEACHER, search=search) for name, search in AGAIN.items()},
    PLAIN: replace(STP, **OPTIONS["target without labels"]),
    f"{PLAIN}, no expansion": replace(STP, expansion=replace(DIRECT, target_ce=0.0)),
    "stp, main let go": replace(STP, expansion=replace(STP.expansion, main="drop")),
    "stp, taught": replace(STP, taught=True),
    "stp, target alone": ALONE,
    ALONE_FINALS: replace(ALONE, **OPTIONS["finals"]),
    TRIED: replace(ALONE, tried_epochs=2),
    TRIED_FINALS: replace(ALONE, **{**OPTIONS["finals"], "finalists": 4}, tried_epochs=4),
    "stp, a sixth stimulative": replace(STP, share=1 / 6),
    "stp, taught, four subnets a step, tuned scores": replace(BEST, tuning_steps=50),
    "stp, taught at first, four subnets a step": replace(BEST, to_the_end=False),
    "slimmable": slimmable,
    PENALTY: group_lasso,
    "torch-pruning": torch_pruning,
    "torch-pruning, even": partial(torch_pruning, even=True),
    "torch-pruning, even, sparse learning": partial(torch_pruning, even=True, sparse=True),
    "torch-pruning, even, labels alone": partial(torch_pruning, even=True, lean=True),
    THEIRS: partial(torch_pruning, even=True, finished=True),
}

#: Methods that train a shape that STP found, and which STP it was.
GIVEN_SHAPE: dict[str, tuple[Callable[[Bench, Subnet, Limit], Trained], str]] = {
    "scratch": (scratch, OURS),
    "scratch + distillation": (scratch_distilled, OURS),
    "scratch, shape of four": (scratch, TAUGHT),
    "scratch + distillation, shape of four": (scratch_distilled, TAUGHT),
    "scratch, shape of a quarter": (scratch, QUARTER),
    "scratch + distillation, shape of a quarter": (scratch_distilled, QUARTER),
    "scratch + distillation, shape of tuned scores": (scratch_distilled, TUNED),
    "scratch, shape that was tried": (scratch, TRIED),
    SCRATCH_TWICE: (partial(twice, make=scratch_distilled), STARTED),
    FINALS_TWICE: (partial(twice, make=scratch_distilled), STARTED_FINALS),
}
