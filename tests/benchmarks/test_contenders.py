"""What methods may spend under equal MACs, the dearest of all expenses being a teacher."""

from dataclasses import replace

import pytest
import torch

BUDGET = 0.3


@pytest.fixture
def bench(tmp_path, on_path):
    from accuracy import PROTOCOLS
    from bench import Bench, Images

    protocol = PROTOCOLS["smoke"]
    return Bench(protocol, Images(protocol.data, torch.device("cpu")), 0, tmp_path)


@pytest.mark.timeout(200)
def test_a_teacher_is_paid_for_where_macs_are_equal(bench):
    from contenders import FORMS, TAUGHT, Limit

    epochs = bench.protocol.epochs
    form = FORMS[TAUGHT]
    spent = form(bench, BUDGET, Limit(epochs)).spent
    lean = replace(form, expansion=replace(form.expansion, main="drop"))
    saving = lean(bench, BUDGET, Limit(epochs, spent))
    assert spent - spent / epochs < saving.spent <= spent
    assert saving.epochs > epochs, "what the main network costs buys epochs"


@pytest.mark.timeout(200)
def test_a_teacher_costs_its_training_and_a_pass_for_each_image_that_it_labels(bench):
    from bench import STEP, macs_of
    from contenders import FORMS, OWN_SHAPE, TAUGHT, Limit

    epochs = bench.protocol.epochs
    epoch = 4 * 64 * bench.full_macs  # a pass of the dense network over all images
    training, limit = epochs * STEP * epoch, Limit(epochs)

    form = replace(FORMS[TAUGHT], target="uniform")  # one shape, whoever teaches
    alone = replace(form, taught=False)(bench, BUDGET, limit).spent
    assert form(bench, BUDGET, limit).spent == alone + training + epochs * epoch
    at_first = replace(form, to_the_end=False)(bench, BUDGET, limit).spent
    assert at_first == alone + training + form.first(epochs) * epoch

    learnt = OWN_SHAPE["scratch + distillation at uniform widths"](bench, BUDGET, limit)
    small = 4 * 64 * bench.supernet().cost(learnt.subnet).macs
    assert learnt.spent == training + epochs * (STEP * small + epoch)

    theirs = OWN_SHAPE["torch-pruning, even"](bench, BUDGET, limit)
    small, half = 4 * 64 * macs_of(theirs.network, bench.example), epochs // 2
    assert theirs.spent == training + half * STEP * epoch + half * (STEP * small + epoch)

    pruned = OWN_SHAPE["torch-pruning, even, of the teacher"](bench, BUDGET, limit)
    small = 4 * 64 * macs_of(pruned.network, bench.example)
    assert pruned.spent == training + epochs * (STEP * small + epoch)
    again = OWN_SHAPE["dense + distillation"](bench, BUDGET, limit)
    assert again.spent == training + epochs * (STEP + 1) * epoch


@pytest.mark.timeout(100)
def test_shapes_that_are_tried_are_paid_for_and_leave_the_supernet_alone(bench, monkeypatch):
    from bench import STEP
    from contenders import OWN_SHAPE, TRIED, Judge, Limit

    form, tried, train = OWN_SHAPE[TRIED], {}, Judge.tried
    net, supernet, _ = form.stimulated(bench)
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}

    def watched(judge, subnet, epochs, after):
        tried[subnet], paid = train(judge, subnet, epochs, after)
        return tried[subnet], paid

    monkeypatch.setattr(Judge, "tried", watched)
    shape, price = form.shape(bench, net, BUDGET)
    assert all(torch.equal(before[name], t) for name, t in net.model.state_dict().items())
    assert tried[shape] == min(tried.values()), "the best of those tried is chosen"
    assert len(tried) == 2, "one of four candidates, in each of two generations"
    assert net.cost(shape).macs <= BUDGET * bench.full_macs

    # the same search, were trying free
    monkeypatch.setattr(Judge, "tried", lambda judge, subnet, epochs, after: (tried[subnet], 0))
    free = type(bench)(bench.protocol, bench.images, bench.seed, bench.work / "free")
    found, without = form.shape(free, net, BUDGET)
    images = form.tried_epochs * bench.images.count("train")
    assert found == shape
    assert price - without == sum(images * STEP * net.cost(subnet).macs for subnet in tried)

    allowed = supernet + 4 * price
    assert supernet + price < form(bench, BUDGET, Limit(1, allowed)).spent <= allowed


@pytest.mark.timeout(200)
def test_a_supernet_of_the_teacher_starts_as_it_with_the_best_units_first(bench):
    from contenders import OWN_SHAPE, STARTED, Limit

    from stp_ray.elastic import importance

    dense = OWN_SHAPE["dense"](bench, BUDGET, Limit(bench.protocol.epochs))
    net, spent, weights = OWN_SHAPE[STARTED].stimulated(bench)
    assert spent == replace(OWN_SHAPE[STARTED], started=False).stimulated(bench)[1]
    net.model.load_state_dict(weights[0])
    images = torch.cat([x for x, _ in bench.images.plain("test", 32)])
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images), dense.network.eval()(images))
    for scores in importance(net).values():
        assert torch.equal(scores, scores.sort(descending=True).values)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("method", "seen_before"),
    [
        ("stp, uniform widths", 0),
        ("stp, target alone", 0),
        ("torch-pruning, even", 0),
        ("torch-pruning, even, sparse learning", 0),
        ("torch-pruning, even, labels alone", 0),
        ("torch-pruning, even, of the teacher", 4),
        ("stp, taught, four subnets a step, a quarter, restart, tuned scores, of the teacher", 4),
        ("group lasso", 0),
        ("scratch at uniform widths", 0),
    ],
)
def test_no_method_sees_an_epoch_twice(bench, monkeypatch, method, seen_before):
    from bench import Images
    from contenders import OWN_SHAPE, Limit

    limit, few = Limit(bench.protocol.epochs), {"calibration_images": 16}
    exploration = replace(bench.protocol.exploration, **few)
    bench.protocol = replace(bench.protocol, exploration=exploration, **few)
    OWN_SHAPE["dense"](bench, BUDGET, limit)  # the teacher
    seen, epoch = [], Images.epoch

    def watched(images, seed, number, batch_size, first=0):
        if batch_size == bench.protocol.batch_size:  # else to calibrate, or to tune in the search
            seen.append(number)
        return epoch(images, seed, number, batch_size, first)

    monkeypatch.setattr(Images, "epoch", watched)
    OWN_SHAPE[method](bench, BUDGET, limit)
    assert seen == list(range(seen_before, seen_before + limit.epochs))


def test_options_of_stimulation_have_a_supernet_of_their_own(bench, monkeypatch):
    """And those of what comes after it share one."""
    from bench import Bench
    from contenders import FORMS, OPTIONS, QUARTER

    names = []

    def kept(bench, name, make):
        names.append(name)
        return {"weights": [bench.supernet().model.state_dict()], "spent": 0}

    monkeypatch.setattr(Bench, "kept", kept)
    forms = [FORMS[QUARTER], *(replace(FORMS[QUARTER], **option) for option in OPTIONS.values())]
    for form in forms:
        form.stimulated(bench)
    for form, name in zip(forms, names, strict=True):
        same = [
            (form.stimulation, form.decay) == (other.stimulation, other.decay) for other in forms
        ]
        assert [name == other for other in names] == same


def test_weight_decay_is_left_out_of_both_phases(bench, monkeypatch):
    from bench import Bench
    from contenders import FORMS, OPTIONS, QUARTER, Limit

    seen, train = [], Bench.train

    def watched(bench, objective, epochs, *, decay=None, **options):
        seen.append(decay)
        return train(bench, objective, epochs, decay=decay, **options)

    monkeypatch.setattr(Bench, "train", watched)
    form = replace(FORMS[QUARTER], target="uniform", **OPTIONS["no weight decay"])
    form(bench, BUDGET, Limit(bench.protocol.epochs))
    assert seen == [None, 0.0, 0.0]  # the teacher has it


def test_equal_macs_are_those_of_the_reference_of_the_protocol(bench, monkeypatch):
    import accuracy
    from contenders import Trained

    bench.protocol = replace(bench.protocol, reference="dear")
    allowed = []

    def spend(bench, budget, limit):
        allowed.append(limit.macs)
        return Trained(bench.fresh(), 0, 1)

    monkeypatch.setitem(accuracy.OWN_SHAPE, "spender", spend)
    done = [
        {"method": "stp", "budget": BUDGET, "training_macs": 10},
        {"method": "dear", "budget": BUDGET, "training_macs": 70},
        {"method": "dear", "budget": 0.5, "training_macs": 90},
    ]
    for account in ("macs", "epochs"):
        cell = {"method": "spender", "budget": BUDGET, "equal": account}
        assert accuracy.needs("dear", cell) == (["dear"] if account == "macs" else [])
        accuracy.train(bench, cell, done)
    assert allowed == [70, None]


@pytest.mark.timeout(60)
def test_shapes_that_nobody_finds_keep_the_budget(bench):
    from contenders import OWN_SHAPE, Limit, unfound

    from stp_ray.elastic import Budget

    budget = 0.35  # of which rounding leaves some
    space = bench.supernet().space
    filled = unfound(bench, space, budget, "filled")
    assert space.cost().macs * budget >= space.cost(filled).macs
    trained = OWN_SHAPE["scratch at uniform widths"](bench, budget, Limit(1))
    at_random = OWN_SHAPE["scratch at a random shape"](bench, budget, Limit(1))
    assert trained.subnet == space.uniform_within(Budget(macs=budget))
    kept = {round(trained.subnet.widths[axis.name] / axis.size, 1) for axis in space.axes}
    assert len(kept) <= 2, "one ratio, rounded to whole channels"
    assert space.cost(filled).macs > space.cost(trained.subnet).macs
    assert at_random.subnet not in (None, trained.subnet)
    assert space.cost(at_random.subnet).macs <= budget * bench.full_macs
    assert trained.spent == trained.epochs * 4 * 64 * 3 * space.cost(trained.subnet).macs


@pytest.mark.timeout(60)
@pytest.mark.parametrize("family", ["smoke", "cifar10_vit_cpu"])
def test_a_shape_from_scratch_starts_by_the_rules_of_the_dense_network(bench, monkeypatch, family):
    """Else one of the two is ahead before the first step."""
    from accuracy import PROTOCOLS
    from bench import Bench
    from contenders import Limit, dense, scratch

    protocol = replace(PROTOCOLS[family], data=bench.protocol.data)
    bench = Bench(protocol, bench.images, 0, bench.work)
    starts = []

    def start(bench, objective, epochs, **_):
        starts.append({n: p.detach().clone() for n, p in objective.model.named_parameters()})
        return 0

    monkeypatch.setattr(Bench, "train", start)
    dense(bench, 1.0, Limit(1))
    scratch(bench, bench.supernet().space.full, Limit(1))
    whole, shape = starts
    assert whole.keys() == shape.keys()
    for name, weight in whole.items():
        if weight.numel() >= 400:
            assert shape[name].std().item() == pytest.approx(weight.std().item(), rel=0.15), name
        assert shape[name].mean().item() == pytest.approx(weight.mean().item(), abs=0.1), name


@pytest.mark.timeout(200)
@pytest.mark.parametrize("family", ["cifar10_mobilenet_v2_cpu", "cifar10_vit_cpu"])
def test_other_families_are_pruned_within_the_budget(bench, family):
    """By ours and by Torch-Pruning, as torch counts what is left."""
    from accuracy import PROTOCOLS
    from bench import Bench, Images, macs_of
    from contenders import GIVEN_SHAPE, OURS, OWN_SHAPE, Limit

    of, small = PROTOCOLS[family], bench.protocol
    protocol = replace(
        small, model=of.model, model_options=of.model_options, optimizer=of.optimizer, epochs=2,
        lr=of.lr, data=replace(small.data, image_size=16),
    )  # fmt: skip
    bench = Bench(protocol, Images(protocol.data, torch.device("cpu")), 0, bench.work)
    assert macs_of(bench.fresh(), bench.example) == bench.supernet().cost().macs
    ours = OWN_SHAPE[OURS](bench, BUDGET, Limit(protocol.epochs))
    again, _ = GIVEN_SHAPE["scratch"]
    theirs = OWN_SHAPE["torch-pruning, even"](bench, BUDGET, Limit(protocol.epochs))
    for found in (ours, again(bench, ours.subnet, Limit(protocol.epochs)), theirs):
        assert macs_of(found.network, bench.example) <= BUDGET * bench.full_macs
        assert found.epochs == protocol.epochs
        assert torch.isfinite(found.network.eval()(bench.example)).all()


@pytest.mark.timeout(200)
def test_another_search_draws_other_candidates_for_the_same_supernet(bench, monkeypatch):
    from contenders import AGAIN, OWN_SHAPE, STARTED_FINALS, Judge

    asked, net = set(), OWN_SHAPE[STARTED_FINALS].stimulated(bench)[0]
    monkeypatch.setattr(Judge, "__call__", lambda judge, subnet, *_: seen.append(subnet) or 1.0)
    for method in (STARTED_FINALS, *AGAIN):
        seen = []
        OWN_SHAPE[method].shape(bench, net, BUDGET)
        asked.add(frozenset(seen))
    assert len(asked) == 1 + len(AGAIN)
