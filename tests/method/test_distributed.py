"""Two data-parallel processes over gloo, without Ray."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stp_ray.method import Stimulation, StimulativeObjective, sampler

from .networks import images_and_labels, supernet
from .workers import trained_in_shares


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What rank 0 and rank 1 found, by the name of the worker's function."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.method.workers", str(rank), str(folder)],
            cwd=Path(__file__).parents[2],
        )
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_reduced_once_and_are_the_mean_of_the_two_ranks(ranks, count):
    one, two = (rank["one_step"][count] for rank in ranks)
    stimulation = Stimulation(subnets=count)
    alone, drawn = [], []
    for rank in (0, 1):
        net = supernet()
        subnets = sampler(stimulation, net.space, [])(random.Random(rank), 0.0)
        StimulativeObjective(net, stimulation)(*images_and_labels(8, seed=rank), subnets)[
            "loss"
        ].backward()
        alone.append({name: p.grad for name, p in net.named_parameters()})
        drawn.append(subnets)
    assert len(drawn[0]) == count and not set(drawn[0]) & set(drawn[1])
    # the bytes of one gradient, whatever the number of subnets
    assert one["reduced"] == two["reduced"] == sum(g.nbytes for g in alone[0].values())
    for name, grad in one["grads"].items():
        assert torch.equal(grad, two["grads"][name])
        torch.testing.assert_close(grad, (alone[0][name] + alone[1][name]) / 2)


def test_two_ranks_agree_and_resume_bit_for_bit(ranks):
    one, two = (rank["resumed"] for rank in ranks)
    for main in ("train", "drop"):
        mine, theirs = one.pop(f"{main}.drawn"), two.pop(f"{main}.drawn")
        assert (mine != theirs).any(), "no step has an expanded subnet on one rank alone"
    for name, tensor in one.items():
        if ".whole." in name:
            assert torch.equal(tensor, one[name.replace(".whole.", ".again.")]), name
        if "running" not in name:
            assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("shares", [2, 3])
def test_a_worker_that_is_left_alone_does_what_both_did(ranks, shares):
    """The same arithmetic in another order of summation: running statistics, too."""
    both = ranks[0]["shared"][str(shares)]
    alone = trained_in_shares(shares)
    fresh = supernet(dropout=0.3).state_dict()
    for name, tensor in both.items():
        torch.testing.assert_close(alone[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        if name.endswith(("weight", "running_mean")) and name.startswith("model."):
            before = fresh[name.removeprefix("model.net.")]
            assert not torch.allclose(tensor, before), f"{name} has not changed"


def test_all_ranks_stop_when_the_loss_of_one_is_not_finite(ranks):
    for found in (rank["spoilt_on_one_rank"] for rank in ranks):
        assert "step 2 of epoch 0 has a loss that is not finite on some worker" in found["message"]
        assert found["finite"]
        assert found["step"] == 2
