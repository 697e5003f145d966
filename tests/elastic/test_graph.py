"""What of a model becomes a graph, and what cannot."""

import math
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stp_ray.elastic import Supernet
from stp_ray.errors import TraceError

from .networks import Own, Written, line_of, pixels, randomised, supernet
from .same import assert_exact


def test_control_flow_on_values_names_the_module_and_the_line():
    class Inner(nn.Module):
        def forward(self, x):
            if x.sum() > 0:  # depends on values
                return x
            return -x

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Inner(), nn.Flatten(), nn.Linear(288, 4))
    with pytest.raises(TraceError) as caught:
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    message = str(caught.value)
    line = line_of(__file__, "if x.sum() > 0:  # depends")
    assert f"module '1' at test_graph.py:{line} `if x.sum() > 0:" in message
    assert "control flow" in message and "\n" not in message
    assert caught.value.exit_code == 2


class Modes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        if self.training:
            x = x * 2
        return self.head(x)


def failing(message):
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError(message)

    return Failing()


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Modes(), "different operations in training and evaluation mode, first at"),
        (failing("first\nsecond"), "first; expected"),
        (failing(""), "RuntimeError; expected"),
        (Two(), "Two wants 'y' besides the images; expected images alone"),
        (nn.Sequential(nn.Conv2d(4, 8, 3)), r"fails on images \[\d+, 3, 8, 8\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(10, 2)), "fails on images"),
    ],
)
def test_models_that_cannot_be_traced_say_why_in_one_line(model, words):
    with pytest.raises(TraceError, match=words) as caught:
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(caught.value)


def without_gradients(m, x):
    with torch.no_grad():
        return m.a(x)


def in_half_precision(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.a(x)


def never_in_half_precision(m, x):
    with torch.autocast("cpu", enabled=False):  # which a training in half precision has on
        return m.a(x)


def by_a_coin(draw):
    return lambda m, x: x if m.training and draw() < 0.5 else x + m.a(x)


def counting(m, x):
    m.count.add_(1)
    return m.a(x) * m.count


def with_a_hidden_parameter(m, x):
    return m.a(x) * (m.hidden[0] * 2)


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (without_gradients, r"test_graph.py.*cannot hold torch\.no_grad"),
        (in_half_precision, r"test_graph.py.*torch\.autocast\(\): detach"),
        (never_in_half_precision, r"test_graph.py.*torch\.autocast\(\): detach"),
        (by_a_coin(lambda: torch.rand(1).item()), "draws random numbers while it decides"),
        (by_a_coin(random.random), "draws random numbers while it decides"),
        (by_a_coin(np.random.rand), "draws random numbers while it decides"),
        (counting, "test_graph.py.*works in place"),
        (with_a_hidden_parameter, "test_graph.py.*a parameter that is not an attribute"),
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_what_a_graph_cannot_hold_is_refused(between, words, gradients):
    model = Written(between, a=nn.Conv2d(8, 8, 3, padding=1))
    model.register_buffer("count", torch.ones(()))
    model.hidden = [nn.Parameter(torch.ones(()))]
    with torch.set_grad_enabled(gradients), pytest.raises(TraceError, match=words):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    assert model.count == 1


def test_buffers_are_read_in_every_run():
    model = Written(lambda m, x: x * (1 / m.scale) + m.places.expand(x.shape[0], -1, -1, -1))
    model.register_buffer("scale", torch.linspace(1, 2, 8).view(-1, 1, 1))
    model.register_buffer("places", torch.randn(1, 8, 8, 8))
    net = supernet(model)
    assert_exact(net, model=model)
    assert not net.frozen
    assert net.model.state_dict().keys() == model.state_dict().keys()
    model.scale.mul_(2)
    net.model.load_state_dict(model.state_dict())
    assert torch.equal(net(pixels(2)), model(pixels(2)))


def test_control_flow_may_depend_on_a_buffer():
    model = Written(lambda m, x: m.a(x) if m.ready else x, a=nn.Conv2d(8, 8, 1))
    model.register_buffer("ready", torch.tensor(True))
    net = supernet(model)
    assert_exact(net, model=model)
    assert "a" in [layer for axis in net.space.axes for layer in axis.layers]


@pytest.mark.parametrize(
    "write", [lambda m: m.count.add_(1), lambda m: setattr(m, "count", m.count + 1)]
)
def test_a_buffer_that_is_written_where_another_decides_is_refused(write):
    def between(m, x):
        if m.ready:
            write(m)
        return m.a(x)

    model = Written(between, a=nn.Conv2d(8, 8, 1))
    model.register_buffer("ready", torch.tensor(True))
    model.register_buffer("count", torch.ones(()))
    with pytest.raises(TraceError, match="control flow"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))


def test_a_model_whose_layers_cannot_be_set_is_refused():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), torch.jit.script(nn.ReLU(inplace=True)))
    with pytest.raises(TraceError, match=r"does not let its `inplace` be set .*jit"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))


@torch.fx.wrap
def told_the_mode(x, training):
    return x * 2 if training and x.sum() != 0 else x


def test_what_such_an_error_advises_is_traced_and_kept_whole():
    model = Written(lambda m, x: told_the_mode(x, m.training))
    net = Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    assert "no rule for told_the_mode" in net.frozen[0].reason
    images = torch.randn(2, 3, 8, 8)
    for training in (True, False):
        torch.testing.assert_close(net.train(training)(images), model.train(training)(images))


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(8, 1), nn.LazyBatchNorm2d()])
def test_a_lazy_layer_that_has_not_run_is_named(lazy):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), lazy, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TraceError, match=r"1\.weight of Sequential has no shape yet.*call it once"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    model(torch.zeros(1, 3, 8, 8))
    Supernet.trace(model, torch.zeros(1, 3, 8, 8))


def test_norms_that_wait_for_other_workers_are_refused():
    """Each worker draws subnets of its own: of other widths, or without the block."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    with pytest.raises(TraceError, match=r"^1 is a SyncBatchNorm.*expected nn\.BatchNorm2d"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))


def test_a_sparse_buffer_is_no_hindrance():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            self.register_buffer("edges", torch.eye(8).to_sparse())

        def forward(self, x):
            return self.head(torch.sparse.mm(self.edges, self.stem(x).mean((2, 3)).t()).t())

    model, images = Graph().eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(Supernet.trace(model, images)(images), model(images))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)))
    with pytest.raises(TraceError, match="Sequential cannot be copied"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))


def test_the_first_argument_is_the_images_and_others_keep_their_defaults():
    model = randomised(Own().double(), pixels(8))
    net = Supernet.trace(model, pixels(1))
    with torch.no_grad():
        assert torch.equal(net.eval()(pixels(2)), model(pixels(2)))
    assert [n.target for n in net.model.graph.nodes if n.op == "placeholder"] == ["x"]


class SizeDecides(nn.Module):
    """Control flow that depends on the size of the images, on the batch, or on a width."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[{"height": 2, "batch": 0, "width": 1}[self.what]] > 4:
            x = x.relu()
        return self.head(self.mix(x)[:, :, : math.ceil(x.shape[3] / 2)].mean((2, 3)))


def test_control_flow_may_depend_on_the_size_of_the_images():
    net = supernet(SizeDecides("height"))
    assert net.frozen == ()
    assert_exact(net)


def test_a_width_that_decides_does_not_shrink():
    net = supernet(SizeDecides("width"))
    assert [(f.name, f.reason.split(":")[0]) for f in net.frozen] == [
        ("stem", "decides what the model computes")
    ]
    assert_exact(net)


def asserted(m, x):
    torch._assert(x.shape[1] == 8, "expected eight channels")
    y = m.a(x)
    torch._assert(y.shape[2] == 8, "expected images of 8 px")
    return m.b(y)


def test_an_asserted_width_does_not_shrink_and_an_asserted_height_is_no_matter():
    net = supernet(Written(asserted, a=nn.Conv2d(8, 16, 1), b=nn.Conv2d(16, 8, 1), width=8))
    assert [(f.name, f.reason.split(":")[0]) for f in net.frozen] == [
        ("stem", "is asked for by an assertion")
    ]
    assert [axis.name for axis in net.space.axes] == ["a", "b"]
    assert_exact(net)


def test_control_flow_on_the_batch_is_refused():
    with pytest.raises(TraceError, match=r"control flow"):
        supernet(SizeDecides("batch"))


class Auxiliary(nn.Module):
    """A head that only training calls, and a rate that only training applies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        aux = self.aux(x) if self.training else None
        x = F.dropout(x.mean((2, 3)), 0.5 if self.training else 0.0)
        return (self.head(x), aux) if self.training else self.head(x)


def test_auxiliary_heads_are_left_out_and_named():
    net = supernet(Auxiliary())
    assert [(f.name, f.reason) for f in net.frozen] == [("aux", "only training calls it; left out")]
    assert_exact(net)
    images = pixels(2)
    net.train()
    torch.manual_seed(0)
    one = net(images)
    assert not torch.equal(one, net(images))  # dropout draws anew
    net.eval()
    assert torch.equal(net(images), net(images))


def normalised():
    model = Own()
    model.register_forward_pre_hook(lambda module, given: ((given[0] - 0.5) / 0.25,))
    return model


def doubled():
    model = Own()
    model.register_forward_hook(lambda module, given, out: 2 * out)
    return model


def own_forward():
    model = Own()
    model.forward = types.MethodType(lambda self, images: Own.forward(self, -images), model)
    return model


@pytest.mark.parametrize("build", [normalised, doubled, own_forward])
def test_what_is_hung_on_the_outermost_module_is_refused_and_may_be_within(build):
    model = build().double().eval()
    with pytest.raises(
        TraceError, match=r"Own has forward hooks, or a forward of its own .* trace"
    ):
        Supernet.trace(model, pixels(2))
    images = pixels(2)
    net = Supernet.trace(nn.Sequential(model), images).eval()
    torch.testing.assert_close(net(images), model(images))


def test_an_identity_that_does_something_stays():
    identity = nn.Identity()
    identity.register_forward_hook(lambda module, given, out: 2 * out)
    model = randomised(Written(lambda m, x: m.twice(x), twice=identity).double(), pixels(8))
    assert_exact(Supernet.trace(model, pixels(1)), model=model)


def test_statistics_that_a_forward_reads_are_refused():
    """Each subnet is measured anew, and what comes after the read with it."""
    model = Written(lambda m, x: m.bn(x) - m.bn.running_mean[:, None, None], bn=nn.BatchNorm2d(8))
    with pytest.raises(TraceError, match=r"reads bn\.running_mean, which every subnet measures"):
        supernet(model)


def test_a_view_of_what_a_norm_writes_is_refused():
    model = Written(lambda m, x: m.bn(x) + m.mean, bn=nn.BatchNorm2d(8))
    model.register_buffer("mean", model.bn.running_mean.view(-1, 1, 1))
    with pytest.raises(TraceError, match=r"share memory that is written in training; expected"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))


def hooked_parameter():
    model = Own()
    model.stem.weight.register_hook(torch.zeros_like)
    return model


def hooked_after_accumulation():
    model = Own()
    model.stem.weight.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
    return model


def hooked_block():
    model = nn.Sequential(Own())
    model[0].register_full_backward_hook(lambda module, given, out: (given[0] * 0,))
    return model


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (hooked_parameter, r"stem\.weight"),
        (hooked_after_accumulation, r"stem\.weight"),
        (hooked_block, "0"),
    ],
)
def test_hooks_that_gradients_would_pass_by_are_refused(build, name):
    with pytest.raises(TraceError, match=f"^{name} has hooks that see gradients.* take them off"):
        Supernet.trace(build(), torch.zeros(1, 3, 8, 8))


def test_a_hook_of_a_layer_sees_its_gradients():
    seen, model = [], Own()
    model.stem.register_full_backward_hook(lambda module, given, out: seen.append(out))
    images = torch.zeros(1, 3, 8, 8, requires_grad=True)
    Supernet.trace(model, images)(images).sum().backward()
    assert len(seen) == 1


class Held(nn.Module):
    """Its `train()` leaves a layer in one mode.

    Args:
        layer: between stem and head.
        mode: the one that it stays in.
    """

    def __init__(self, layer: nn.Module, mode: bool) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 8, 3), layer, nn.Linear(8, 4)
        self.unused, self.mode = nn.BatchNorm2d(8), mode

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x)).mean((2, 3)))

    def train(self, mode: bool = True) -> "Held":
        super().train(mode)
        self.layer.train(self.mode)
        self.unused.eval()
        return self


@pytest.mark.parametrize(
    ("layer", "mode", "words"),
    [
        (nn.BatchNorm2d(8), False, "layer is in evaluation mode where Held is not"),
        (
            nn.InstanceNorm2d(8, track_running_stats=True),  # asks in a method of its base class
            False,
            "layer is in evaluation mode where Held is not",
        ),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), True, "layer.1 is in training mode where Held"),
    ],
)
def test_a_train_that_holds_a_layer_is_refused(layer, mode, words):
    with pytest.raises(TraceError, match=words):
        supernet(Held(layer, mode))


class Still(nn.BatchNorm2d):
    """Holds itself, which the graph keeps."""

    def train(self, mode: bool = True) -> "Still":
        return super().train(False)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 1), Still(8)])
def test_a_train_that_changes_nothing_that_the_graph_does_is_no_matter(layer):
    net = supernet(Held(layer, False))
    assert_exact(net)
    net.train()
    assert net.model.get_submodule("layer").training is isinstance(layer, nn.Conv2d)
