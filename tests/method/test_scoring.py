import math
from dataclasses import replace

import pytest
import torch

from stp_ray.method import (
    Optimisation,
    calibrate,
    kl_divergence,
    reference_logits,
    score,
    tuned_score,
)

from .networks import images_and_labels, left_as_it_was, supernet

OPTIONS = Optimisation(batch_size=128, lr=0.1)


def tuned(net, subnet, images, *, steps=20, options=OPTIONS, seed=0):
    """The score of a slice that has learnt from these images, on the same ones."""
    parts = images.split(8)
    main = reference_logits(net, parts)
    return tuned_score(
        net,
        subnet,
        parts,
        lambda: parts,
        main,
        parts,
        main,
        steps=steps,
        options=options,
        seed=seed,
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["as it is", "tuned"])
def test_scoring_leaves_the_network_as_it_was_and_repeats_itself(training, how):
    net = supernet(dropout=0.5).train(training)
    net.model.get_submodule("dropout").train(not training)
    images, _ = images_and_labels(16)
    subnet = net.space.uniform(0.5)

    def scored():
        if how == "tuned":
            return tuned(net, subnet, images)
        return score(
            net, subnet, images.split(8), images.split(4), reference_logits(net, images.split(8))
        )

    with left_as_it_was(net):
        first = scored()
        torch.manual_seed(1)
        assert scored() == first


def test_score_is_zero_for_the_main_network_and_does_not_depend_on_batching():
    net = supernet()
    images, _ = images_and_labels(24)
    bare = supernet(norm=False)
    assert score(bare, bare.space.full, [images], [images], reference_logits(bare, [images])) == 0
    main = reference_logits(net, [images])
    subnet = net.space.uniform(0.25)
    whole = score(net, subnet, [images], [images], main)
    assert whole > 0
    assert score(net, subnet, [images], images.split(7), main) == pytest.approx(whole, rel=1e-5)


def test_score_is_the_divergence_from_the_main_network_with_statistics_measured_anew():
    net, (images, _) = supernet(), images_and_labels(24)
    subnet, main = net.space.uniform(0.5), reference_logits(net, [images])
    stats = calibrate(net, subnet, [images[:8]])
    wanted = kl_divergence(main, net.eval()(images, subnet, stats=stats)).item()
    assert score(net, subnet, [images[:8]], [images], main) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("rows", [0, 16, 32])
def test_score_wants_the_logits_of_its_images(rows):
    net = supernet()
    images, _ = images_and_labels(24)
    with pytest.raises(ValueError, match=r"number of images is .*; expected as many as rows"):
        score(net, net.space.full, [images], images.split(8), torch.zeros(rows, 3))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_slice_that_has_learnt_imitates_better(share):
    net = supernet()
    images, _ = images_and_labels(24)
    subnet, parts = net.space.uniform(share), images.split(8)
    plain = score(net, subnet, parts, parts, reference_logits(net, parts))
    few, many = (tuned(net, subnet, images, steps=steps) for steps in (5, 80))
    assert many < few < plain


def test_each_pass_begins_with_the_first_image_and_its_logits():
    """Six steps of three batches are two passes, and the same as one over all of them twice."""
    net, (images, _) = supernet(), images_and_labels(16)
    subnet, main = net.space.uniform(0.5), reference_logits(net, [images])
    passes = []

    def learnt():
        passes.append(len(passes))
        yield from images.split(5)  # the last image is less than a step's worth and left out

    def scored(learnt, steps):
        return tuned_score(
            net, subnet, [images], learnt, main, [images], main,
            steps=steps, options=OPTIONS, seed=0,
        )  # fmt: skip

    whole = list(images[:15].split(5)) * 2
    twice = torch.cat([main[:15], main[:15]])
    assert scored(learnt, 6) == tuned_score(
        net, subnet, [images], lambda: iter(whole), twice, [images], main,
        steps=6, options=OPTIONS, seed=0,
    )  # fmt: skip
    assert len(passes) == 3  # one look at the first batch, two passes
    assert scored(learnt, 6) != scored(lambda: images.flip(0).split(5), 6)


def test_the_main_network_has_nothing_to_learn_from_itself():
    net = supernet(norm=False)
    images, _ = images_and_labels(24)
    still = replace(OPTIONS, weight_decay=0.0)
    assert tuned(net, net.space.full, images, options=still) == pytest.approx(0, abs=1e-6)


def test_the_learning_rate_belongs_to_a_batch():
    """A rate for twice the images is the same rate."""
    net, (images, _) = supernet(), images_and_labels(24)
    subnet = net.space.uniform(0.5)
    twice = replace(OPTIONS, batch_size=256, lr=0.2)
    assert tuned(net, subnet, images, options=twice) == tuned(net, subnet, images)


def test_a_slice_that_diverges_has_no_score():
    net, (images, _) = supernet(norm=False), images_and_labels(24)
    wild = replace(OPTIONS, lr=1e12)
    assert math.isnan(tuned(net, net.space.uniform(0.5), images, options=wild))


def test_what_was_tuned_is_scored_in_evaluation_mode():
    net, (images, _) = supernet(dropout=0.5).train(), images_and_labels(24)
    subnet, main = net.space.uniform(0.5), reference_logits(net, [images])

    def scored(parts):
        return tuned_score(
            net, subnet, [images], lambda: [images], main, parts, main,
            steps=3, options=OPTIONS, seed=0,
        )  # fmt: skip

    assert scored(images.split(4)) == pytest.approx(scored([images]), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.2},
        {"min_lr": 0.5},
        {"warmup_epochs": 0.0},
        {"ema": 0.9},
        {"epochs": 3},
    ],
)
def test_a_few_steps_have_a_schedule_of_their_own(options):
    net, (images, _) = supernet(), images_and_labels(24)
    subnet = net.space.uniform(0.5)
    changed = tuned(net, subnet, images, options=replace(OPTIONS, **options))
    assert changed == tuned(net, subnet, images)
