import json
import math
import random
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stp_ray.errors import RunError, StorageError
from stp_ray.method import (
    DenseObjective,
    Expansion,
    ExpansionObjective,
    Optimisation,
    Stimulation,
    StimulativeObjective,
    Teacher,
    Trainer,
    evaluate,
    ladder,
    learning_rate,
    sampler,
)
from stp_ray.models import build_model

from .networks import Residual, batches, images_and_labels, supernet

STEPS = 4


def no_subnets(rng, progress):
    return []


def trainer_of(net, options=None, kind="stimulative", **more):
    options = options or Optimisation(epochs=3, batch_size=16)
    if kind == "stimulative":
        stimulation = Stimulation(subnets=2, resolutions=(1.0, 0.75))
        objective = StimulativeObjective(net, stimulation)
        draw = sampler(stimulation, net.space, [])
    else:
        expansion = Expansion(main=kind)
        target = net.space.uniform(0.25)
        objective = ExpansionObjective(net, target, expansion)
        draw = ladder(net.space, target, expansion)
    return Trainer(objective, options, steps_per_epoch=STEPS, seed=7, **more), draw


def assert_equal_states(one, other):
    (tensors, meta), (other_tensors, other_meta) = one.state(), other.state()
    assert meta == other_meta
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name


# -- the schedule -------------------------------------------------------------------


@given(
    st.integers(1, 20), st.integers(1, 50), st.floats(0, 1), st.floats(0, 1), st.floats(1e-4, 10)
)
def test_learning_rate_rises_then_falls_within_its_bounds(epochs, steps, warm, least, lr):
    options = Optimisation(epochs=epochs, lr=lr, warmup_epochs=warm * epochs, min_lr=least)
    total = epochs * steps
    rates = [learning_rate(options, step, total) for step in range(total)]
    warmup = round(warm * total)
    assert all(0 < rate <= lr * (1 + 1e-12) for rate in rates if least > 0)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(lr)
    assert learning_rate(options, total, total) == pytest.approx(
        lr if warmup == total and total == 0 else lr * least if warmup < total else lr
    )


def test_learning_rate_at_known_places():
    options = Optimisation(epochs=10, lr=1.0, warmup_epochs=1.0, min_lr=0.2)
    assert learning_rate(options, 0, 100) == pytest.approx(0.1)
    assert learning_rate(options, 9, 100) == pytest.approx(1.0)
    assert learning_rate(options, 10, 100) == pytest.approx(1.0)
    assert learning_rate(options, 55, 100) == pytest.approx(0.6)
    assert learning_rate(options, 100, 100) == pytest.approx(0.2)


# -- the loop -----------------------------------------------------------------------


def test_training_learns_and_reports_every_step():
    torch.manual_seed(0)
    model = Residual()
    options = Optimisation(epochs=5, lr=0.1, checkpoint_every=3)
    trainer = Trainer(DenseObjective(model), options, steps_per_epoch=10, seed=0)
    seen = list(trainer.run(batches(10, 32), no_subnets))
    assert [p.step for p in seen] == list(range(1, 51))
    assert [p.epoch for p in seen] == [step // 10 for step in range(50)]
    assert [p.step for p in seen if p.end_of_epoch] == [10, 20, 30, 40, 50]
    assert [p.step for p in seen if p.checkpoint_due] == [
        s for s in range(1, 51) if s % 3 == 0 or s % 10 == 0
    ]
    assert all(p.lr == learning_rate(options, p.step - 1, 50) for p in seen)
    assert trainer.finished
    assert list(trainer.run(batches(10, 32), no_subnets)) == []
    metrics = evaluate(model.eval(), [images_and_labels(200, seed=12345)])
    assert metrics["count"] == 200
    assert metrics["top1"] > 60
    assert seen[-1].metrics["loss"] < seen[0].metrics["loss"]


def test_metrics_are_not_read_before_they_are_asked_for():
    trainer, draw = trainer_of(supernet())
    (progress,) = islice(trainer.run(batches(STEPS), draw), 1)
    assert "metrics" not in vars(progress)
    assert set(progress.metrics) == {"loss", "ce", "kd"}
    assert progress.metrics["loss"] == pytest.approx(
        progress.metrics["ce"] + progress.metrics["kd"]
    )


def test_the_consumer_may_evaluate_between_two_steps():
    nets = supernet(dropout=0.3), supernet(dropout=0.3)
    images, _ = images_and_labels(4)
    for net, looks in zip(nets, (False, True), strict=True):
        trainer, draw = trainer_of(net)
        for _ in trainer.run(batches(STEPS), draw):
            if looks:
                net.eval()
                net(images)
                torch.rand(3)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_different_ranks_draw_different_subnets_unless_told_otherwise():
    net = supernet()
    for different in (True, False):
        stimulation = Stimulation(different_per_rank=different)
        drawn = []
        for rank in (0, 1):
            objective = StimulativeObjective(net, stimulation)
            trainer = Trainer(
                objective, Optimisation(), steps_per_epoch=STEPS, seed=7, rank=rank, world_size=2
            )
            seen = []

            def draw(rng, progress, seen=seen):
                seen.append(rng.random())
                return []

            list(islice(trainer.run(batches(STEPS), draw), 2))
            drawn.append(seen)
        assert (drawn[0] != drawn[1]) == different


def test_soft_labels_train():
    trainer, draw = trainer_of(supernet())
    losses = [p.metrics["loss"] for p in trainer.run(batches(STEPS, soft=True), draw)]
    assert all(map(math.isfinite, losses))


def test_norms_and_biases_do_not_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(2, 3, 8, 8))
    model.register_parameter("relative_position_bias", nn.Parameter(torch.ones(2, 2)))
    for optimizer in ("sgd", "adamw"):
        options = Optimisation(epochs=1, optimizer=optimizer, weight_decay=0.5, lr=0.1)
        trainer = Trainer(DenseObjective(model), options, steps_per_epoch=1, seed=0)
        decays = {
            id(p): group["weight_decay"]
            for group in trainer._optimizer.param_groups
            for p in group["params"]
        }
        for name, parameter in model.named_parameters():
            assert decays[id(parameter)] == (0.5 if name in ("0.weight", "3.weight") else 0), name


def groups_of(model):
    """The names of the parameters that decay, and of those that do not."""
    options = Optimisation(epochs=1, weight_decay=0.5)
    trainer = Trainer(DenseObjective(model), options, steps_per_epoch=1, seed=0)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["weight_decay"]: g["params"] for g in trainer._optimizer.param_groups}
    return [[names[id(p)] for p in groups[decay]] for decay in (0.5, 0.0)]


class Shaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.rms = nn.LayerNorm([3, 8, 8]), nn.RMSNorm([3, 8, 8])
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.token = nn.Parameter(torch.zeros(1, 1, 192))
        self.places = nn.Parameter(torch.zeros(1, 2, 192))
        self.each = nn.Conv2d(3, 3, 1, groups=3, bias=False)
        self.head = nn.Linear(192, 1)


def test_norms_of_images_scales_and_class_tokens_do_not_decay():
    decayed, spared = groups_of(Shaped())
    assert decayed == ["places", "each.weight", "head.weight"]
    assert spared == ["scale", "token", "norm.weight", "norm.bias", "rms.weight", "head.bias"]


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_in_convolutional_networks_all_but_vectors_decay(name):
    model = build_model(name, num_classes=1)
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    assert groups_of(model) == [
        [name for name, rank in shapes.items() if rank > 1],
        [name for name, rank in shapes.items() if rank == 1],
    ]


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_has_the_momentum_that_was_asked_for(nesterov):
    trainer, _ = trainer_of(supernet(), Optimisation(momentum=0.8, nesterov=nesterov))
    for group in trainer._optimizer.param_groups:
        assert (group["momentum"], group["nesterov"]) == (0.8, nesterov)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped(precision):
    net = supernet()
    options = Optimisation(
        epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, warmup_epochs=0, min_lr=1.0,
        grad_clip=1e-3, precision=precision,
    )  # fmt: skip
    trainer, draw = trainer_of(net, options)
    moved, before = [], [p.detach().clone() for p in net.parameters()]
    for _ in trainer.run(batches(STEPS), draw):
        after = [p.detach().clone() for p in net.parameters()]
        pairs = zip(after, before, strict=True)
        moved.append(sum((p - q).square().sum() for p, q in pairs).sqrt().item())
        before = after
    assert max(moved) <= 1.01e-3
    assert moved[-1] >= 0.98e-3, "clipped while they were scaled"


class Listening(nn.Module):
    """Remembers the type that its layer computes in."""

    def __init__(self):
        super().__init__()
        self.head, self.seen = nn.Linear(192, 3), None

    def forward(self, images):
        out = self.head(images.flatten(1))
        self.seen = out.dtype
        return out


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_layers_compute_in_the_precision_that_was_asked_for(precision, dtype):
    model, options = Listening(), Optimisation(epochs=1, precision=precision)
    trainer = Trainer(DenseObjective(model), options, steps_per_epoch=1, seed=0)
    list(trainer.run(batches(1), no_subnets))
    assert model.seen == dtype


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_keeps_weights_in_single_precision(precision):
    net = supernet()
    trainer, draw = trainer_of(net, Optimisation(epochs=1, lr=0.05, precision=precision))
    before = [p.detach().clone() for p in net.parameters()]
    losses = [p.metrics["loss"] for p in trainer.run(batches(STEPS), draw)]
    assert all(map(math.isfinite, losses))
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_average_follows_the_weights_and_is_put_in_place_for_a_while():
    net = supernet()
    trainer, draw = trainer_of(net, Optimisation(epochs=3, lr=0.1, ema=0.9))
    history = []
    for progress in trainer.run(batches(STEPS), draw):
        history.append((progress.step, net.model.get_parameter("head.weight").detach().clone()))
    torch.manual_seed(0)
    average = supernet().model.get_parameter("head.weight").detach().clone()
    for step, weight in history:
        average.lerp_(weight, 1 - min(0.9, (1 + step) / (10 + step)))
    live = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(KeyError), trainer.averaged():
        torch.testing.assert_close(net.model.get_parameter("head.weight").detach(), average)
        assert not torch.equal(net.model.norm.running_mean, live["model.norm.running_mean"])
        raise KeyError
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, live[name]), name


def test_an_average_leaves_infinite_masks_as_they_are():
    net = supernet()
    mask = torch.full((4, 4), -torch.inf).triu(1)
    net.model.register_buffer("mask", mask.clone())
    options = Optimisation(epochs=1, ema=0.9)
    trainer, draw = trainer_of(net, options)
    list(trainer.run(batches(STEPS), draw))
    with trainer.averaged():
        assert torch.equal(net.model.mask, mask)
        assert all(bool(p.isfinite().all()) for p in net.parameters())
    other, _ = trainer_of(net, options)
    tensors, meta = trainer.state()
    assert "ema.net.model.mask" not in tensors
    # as states were saved before
    before = {**tensors, "ema.net.model.mask": torch.full((4, 4), torch.nan)}
    other.load(before, meta)
    assert torch.equal(net.model.mask, mask)


def test_without_an_average_the_weights_themselves_are_in_place():
    net = supernet()
    trainer, _ = trainer_of(net)
    before = net.model.get_parameter("head.weight").detach().clone()
    with trainer.averaged():
        assert torch.equal(net.model.get_parameter("head.weight"), before)
    assert not any(name.startswith("ema.") for name in trainer.state()[0])


# -- labels ---------------------------------------------------------------------------


def test_a_teacher_makes_the_labels_and_is_no_part_of_the_state():
    torch.manual_seed(1)
    teacher, seen = Teacher(Residual(), 0.3), []

    class Listening(DenseObjective):
        def forward(self, images, labels, subnets=(), backward=None):
            seen.append((images, labels))
            return super().forward(images, labels, subnets, backward)

    options = Optimisation(epochs=1, batch_size=16)
    taught = Trainer(Listening(Residual()), options, steps_per_epoch=2, seed=7, label=teacher)
    alone = Trainer(DenseObjective(Residual()), options, steps_per_epoch=2, seed=7)
    list(taught.run(batches(2), no_subnets))
    list(alone.run(batches(2), no_subnets))
    for (images, labels), (plain, classes) in zip(seen, batches(2)(0, 0), strict=True):
        assert torch.equal(images, plain)
        assert torch.equal(labels, teacher(plain, classes))
    assert taught.state()[0].keys() == alone.state()[0].keys()


# -- stopping and going on ----------------------------------------------------------

RESUMED = [
    {},
    {"optimizer": "adamw", "lr": 0.01},
    {"ema": 0.9, "grad_clip": 1.0, "label_smoothing": 0.1},
    {"precision": "bf16", "nesterov": False},
    {"precision": "fp16", "lr": 0.01},
    {"momentum": 0.0},
]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [*(("stimulative", fields) for fields in RESUMED), ("train", {}), ("drop", {})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "sgd",
)
def test_interrupted_training_equals_uninterrupted_training_bit_for_bit(kind, fields):
    options = Optimisation(epochs=2, batch_size=16, **fields)
    whole, draw = trainer_of(supernet(dropout=0.3), options, kind)
    for _ in whole.run(batches(STEPS), draw):
        pass
    for stop in (1, STEPS, STEPS + 1):
        first, draw = trainer_of(supernet(dropout=0.3), options, kind)
        for _ in islice(first.run(batches(STEPS), draw), stop):
            pass
        tensors, meta = first.state()
        meta = json.loads(json.dumps(meta))
        torch.manual_seed(99)  # another process, another past
        second, draw = trainer_of(supernet(dropout=0.3, seed=1), options, kind)
        second.load(tensors, meta)
        assert second.step == stop
        for _ in second.run(batches(STEPS), draw):
            pass
        assert_equal_states(whole, second)


def test_state_is_a_copy_with_stable_names():
    trainer, draw = trainer_of(supernet(), Optimisation(epochs=2, ema=0.9))
    run = trainer.run(batches(STEPS), draw)
    next(run)
    tensors, _ = trainer.state()
    kept = {name: t.clone() for name, t in tensors.items()}
    next(run)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, kept[name])
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
    assert {name.partition(".")[0] for name in tensors} == {"model", "optim", "ema"}
    assert "model.net.model.head.weight" in tensors
    assert "optim.net.model.head.weight.momentum_buffer" in tensors


def test_tied_weights_are_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    trainer = Trainer(DenseObjective(Tied()), Optimisation(), steps_per_epoch=1, seed=0)
    tensors, meta = trainer.state()
    assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)
    trainer.load(tensors, meta)


def test_a_state_that_does_not_fit_is_refused_before_anything_is_changed():
    trainer, draw = trainer_of(supernet())
    list(islice(trainer.run(batches(STEPS), draw), 2))
    tensors, meta = trainer.state()
    other, _ = trainer_of(supernet(seed=3))
    before = other.state()[0]
    weight = "model.net.model.head.weight"
    slot = "optim.net.model.head.weight.momentum_buffer"
    for bad_tensors, bad_meta, message in [
        (tensors, meta | {"steps_per_epoch": 5}, "checkpoint has steps_per_epoch 5; expected 4"),
        (tensors, meta | {"seed": 8}, "checkpoint has seed 8; expected 7"),
        ({n: t for n, t in tensors.items() if n != weight}, meta, "model tensors differ"),
        (tensors | {weight: torch.zeros(2)}, meta, "model tensors differ"),
        (tensors | {"ema.x": torch.zeros(2)}, meta, "ema tensors differ"),
        (tensors | {slot: torch.zeros(2)}, meta, "fits no parameter"),
        (tensors | {"optim.y.z": torch.zeros(2)}, meta, "fits no parameter"),
    ]:
        with pytest.raises(StorageError, match=message):
            other.load(bad_tensors, bad_meta)
    assert other.step == 0
    for name, tensor in other.state()[0].items():
        assert torch.equal(tensor, before[name])


# -- what goes wrong ----------------------------------------------------------------


def spoilt(good, at):
    """The same batches, but with images that are not numbers in one step."""

    def of(epoch, first):
        for step, (images, labels) in enumerate(good(epoch, first), start=first):
            bad = epoch * STEPS + step == at
            yield (images * float("nan") if bad else images), labels

    return of


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt(precision):
    net = supernet()
    trainer, draw = trainer_of(net, Optimisation(epochs=2, lr=0.01, precision=precision, ema=0.9))
    run = trainer.run(spoilt(batches(STEPS), 5), draw)
    for _ in range(5):
        next(run)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RunError, match=r"step 5 of epoch 1 has a loss.*loss=nan.*lower lr") as e:
        next(run)
    assert "\n" not in str(e.value)
    assert trainer.step == 5
    for parameter, kept in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)


def test_rare_checks_still_come_before_a_checkpoint():
    trainer, draw = trainer_of(supernet(), check_every=50)
    reached = []
    with pytest.raises(RunError, match="one of the 50 before it"):
        for progress in trainer.run(spoilt(batches(STEPS), 1), draw):
            reached.append(progress)
    assert not any(p.checkpoint_due for p in reached)


def test_weights_that_are_not_finite_are_never_handed_out_for_a_checkpoint():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 3))

        def forward(self, images):
            return (images.mean((2, 3)) @ self.weight.abs().sqrt()) * 0 + self.weight.sum()

    trainer = Trainer(DenseObjective(Steep()), Optimisation(epochs=1), steps_per_epoch=1, seed=0)
    with pytest.raises(RunError, match=r"weight model\.weight is not finite after step 0"):
        list(trainer.run(batches(1), no_subnets))


def test_an_epoch_that_is_too_short_is_named():
    trainer, draw = trainer_of(supernet())
    with pytest.raises(RunError, match="epoch 0 ended after 3 steps; expected 4"):
        list(trainer.run(batches(STEPS - 1), draw))


def test_batches_beyond_the_epoch_are_left_alone():
    trainer, draw = trainer_of(supernet(), Optimisation(epochs=2))
    assert len(list(trainer.run(batches(STEPS + 3), draw))) == 2 * STEPS


def test_a_step_draws_from_its_number_alone():
    trainer, _ = trainer_of(supernet())
    drawn = []

    def draw(rng, progress):
        drawn.append((rng.random(), progress))
        return []

    list(trainer.run(batches(STEPS), draw))
    assert drawn == [
        (random.Random(f"7:{step}:0").random(), step / trainer.total_steps) for step in range(12)
    ]


# -- evaluation ---------------------------------------------------------------------


def test_evaluation_counts_every_image_once():
    images, labels = images_and_labels(10)
    logits = torch.nn.functional.one_hot(labels, 3).float() * 5
    logits[:3] = -logits[:3]

    def forward(batch):
        index = [int((images == image).flatten(1).all(1).nonzero()[0]) for image in batch]
        return logits[index]

    found = evaluate(forward, zip(images.split(4), labels.split(4), strict=True))
    assert found["count"] == 10
    assert found["top1"] == pytest.approx(70.0)
    wanted = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="number of images is 0; expected at least 1"):
        evaluate(forward, [])
