"""The supernet that a configuration describes, the same on driver and workers."""

import copy
import io
import pickle
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..artifacts import Store
from ..config import RunConfig
from ..data import DataSummary
from ..data.storage import open_filesystem, patiently
from ..elastic import Supernet, importance
from ..elastic.latency import LatencyTable
from ..errors import ConfigError, DataError, OptionError, StorageError
from ..method.modes import inspecting
from ..method.objective import scaled
from ..models import build_for

#: Where a run keeps its table of latencies.
LATENCY, TABLE = "latency", "table.json"


def build_supernet(config: RunConfig, summary: DataSummary) -> Supernet:
    """Build the dense network with weights drawn from the seed, and trace it.

    Raises:
        ConfigError: the model is unknown, cannot be built, or has nothing to train.
        TraceError: it cannot be traced.
        DataError: it does not give one logit per class of the data.
    """
    torch.manual_seed(config.seed)
    size = summary.image_size
    data = {"num_classes": summary.num_classes, "image_size": size}
    model = build_for(config.model.name, data, config.model.kwargs)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ConfigError(
            f"model {config.model.name!r} has tensors on the meta device, without values; expected "
            "a model with weights; build it outside of torch.device('meta')"
        )
    if config.model.weights:
        load_weights(model, config.model.weights)
    example = torch.zeros(1, 3, size, size)
    space = config.space
    try:
        net = Supernet.trace(
            model, example, divisor=divisor(config), min_ratio=space.min_ratio,
            ignore=space.ignore, only=space.only,
        )  # fmt: skip
    except OptionError as error:  # a pattern; the rest is checked with the configuration
        raise ConfigError(f"space.ignore and space.only: {error}") from error
    if config.model.given and config.model.ranking:
        net.rank(importance(net, config.model.ranking))
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ConfigError(
            f"model {config.model.name!r} has no parameter that is trained; expected some with "
            "requires_grad; leave its weights unfrozen"
        )
    classes = _logits(net, example)
    if classes != summary.num_classes:
        own = ":" in config.model.name
        cure = "let the function take num_classes" if own else "set model.kwargs.num_classes"
        raise DataError(
            f"model {config.model.name!r} gives {classes} logits for data of "
            f"{summary.num_classes} classes; expected as many; {cure} or choose other data"
        )
    return net


def divisor(config: RunConfig) -> int | None:
    """What widths are multiples of. Under a latency budget that is 8 where nothing is said: the
    odd widths of a small network save arithmetic, but no time [ours]."""
    return 8 if timed(config) and config.space.divisor is None else config.space.divisor


def timed(config: RunConfig) -> bool:
    """Whether a budget bounds latency."""
    return any(budget.timed for budget in config.budgets)


def price(config: RunConfig, run: Store, net: Supernet) -> None:
    """Have the prices of a network's space hold latencies, where a budget of the run bounds them.

    Args:
        config: the run's configuration.
        run: the run's folder, with its table.
        net: gets a space with the table's terms.

    Raises:
        StorageError: the table is missing or damaged, or of another network.
    """
    if not timed(config):
        return
    table = latency_table(run)
    try:
        net.space = net.space.timed(table.terms)
    except KeyError as error:
        raise StorageError(
            f"{run.uri}/{LATENCY}/{TABLE} names {error}, which is not in this network; expected "
            "the table of the same model; delete the file to measure anew"
        ) from error
    except ValueError as error:
        raise StorageError(
            f"{run.uri}/{LATENCY}/{TABLE}: {error}; delete the file to measure anew"
        ) from error


def latency_table(run: Store) -> LatencyTable:
    """The table of a run that a latency budget wants.

    Raises:
        StorageError: it is missing or damaged.
    """
    store = run.child(LATENCY)
    try:
        return LatencyTable.from_content(store.read_json(TABLE))
    except ValueError as error:
        raise StorageError(f"{store.uri}/{TABLE}: {error}") from error


def _logits(net: Supernet, example: torch.Tensor) -> int:
    with inspecting(net):
        out = net(example)
    if not isinstance(out, torch.Tensor) or out.dim() != 2:
        raise ConfigError("the model does not return logits [B, classes]; expected one tensor")
    return out.shape[1]


def check_images(config: RunConfig, net: Supernet, size: int) -> None:
    """That the network can be trained on what a step will hold: its subnets, the smaller images
    that they get, and batches of one image, where a worker's share is no larger.

    Raises:
        ConfigError: it cannot.
    """
    example = torch.zeros(1, 3, size, size)
    try:
        with inspecting(net):
            net(example.expand(2, -1, -1, -1), net.space.smallest)
    except Exception as error:
        raise ConfigError(
            f"the smallest subnet of {config.model.name!r} does not run ({_short(error)}); "
            "expected one that does: tracing has missed something; name what must stay whole in "
            "space.ignore, and report the model"
        ) from error
    sizes = [scaled(example, scale) for scale in config.supernet.stimulation.resolutions]
    for images in sizes:
        try:
            _logits(net, images)
        except Exception as error:  # torch's own, or an assertion of the model's
            raise ConfigError(
                f"supernet.stimulation.resolutions is {config.supernet.stimulation.resolutions}, "
                f"and {config.model.name!r} does not take images of {images.shape[-1]} px "
                f"({_short(error)}); expected scales that it takes; [1.0] keeps their size"
            ) from error
    for options, workers, seen in (
        (config.baseline_options(), config.cluster.num_workers, [example]),
        (config.supernet.optimisation, config.cluster.num_workers, [example, *sizes]),
        (config.finalize.optimisation, config.finalize.num_workers, [example]),
    ):
        if options is not None and options.batch_size == workers:
            for images in seen:
                _train_on_one(
                    config.model.name, net, images, "batch_size gives a worker one image a step",
                    "raise batch_size or have fewer num_workers",
                )  # fmt: skip
    search = config.explore
    for setting, count in (
        ("explore.calibration_images", search.calibration_images),
        ("explore.tuning_images", search.tuning_images if search.tuning_steps else None),
        ("finalize.calibration_images", config.finalize.calibration_images),
    ):
        if count == 1:
            _train_on_one(
                config.model.name, net, example, f"{setting} is 1", f"raise {setting}"
            )  # fmt: skip


def _train_on_one(name: str, net: Supernet, images: torch.Tensor, found: str, remedy: str) -> None:
    copied = copy.deepcopy(net.model).train()
    try:
        copied(images)
    except ValueError as error:  # BatchNorm's, which has nothing to take a mean over
        raise ConfigError(
            f"{found}, and {name!r} cannot be trained on one ({_short(error)}); expected two or "
            f"more; {remedy}"
        ) from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def load_weights(model: nn.Module, uri: str) -> None:
    """Initial weights from a state dict at a URI: safetensors, or torch's format read with
    `weights_only=True`, which cannot run code.

    Raises:
        StorageError: it cannot be read, or does not fit the model.
    """
    import safetensors.torch

    content = read_weights(uri)
    try:
        if content[8:9] == b"{":  # safetensors: the length of a JSON object, and it
            state = safetensors.torch.load(content)
        else:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        _require_names(model, state)
        model.load_state_dict(state)
        _require_finite(model)
    except Exception as error:  # every backend and format has errors of its own
        # torch's text is long, and tells how code in the file could be run
        pickled = isinstance(error, (pickle.UnpicklingError, LookupError, EOFError))
        reason = "it is damaged, or holds more than tensors" if pickled else _short(error)
        raise _unusable(uri, reason) from error


def read_weights(uri: str) -> bytes:
    """The file of initial weights, whole, for some web servers let nobody go back. Remote storage
    that does not answer is asked again.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        filesystem, path = open_filesystem(uri)
        return bytes(patiently(filesystem, path, partial(filesystem.cat_file, path)))
    except Exception as error:  # every backend has errors of its own
        cause = error.__cause__ if isinstance(error, DataError) else error
        raise _unusable(uri, _short(cause or error)) from error


def _unusable(uri: str, reason: str) -> StorageError:
    return StorageError(
        f"weights {uri} cannot be loaded: {reason}; expected a state dict of the model, as "
        "safetensors or by torch.save(model.state_dict(), ...); change model.weights"
    )


def _require_finite(model: nn.Module) -> None:
    """Raise ValueError where a parameter of the model is not: its loss would never be finite. A
    buffer may hold infinities, as masks of attention do."""
    found = [(name, parameter.isfinite()) for name, parameter in model.named_parameters()]
    found += [(name, ~buffer.isnan()) for name, buffer in model.named_buffers()]
    for name, fine in found:
        if not fine.all():
            raise ValueError(f"{name!r} holds values that are not finite")


def _require_names(model: nn.Module, state: Any) -> None:
    """Raise ValueError where a state dict has none of the model's names, for torch would list all
    of them: it is that of a wrapped model, or stands in a larger file."""
    wanted, found = list(model.state_dict()), list(state) if isinstance(state, Mapping) else []
    if wanted and not set(wanted) & set(found):
        holds = ", ".join(map(repr, found[:3])) or type(state).__name__
        raise ValueError(f"it holds {holds}, and the model begins with {wanted[0]!r}")
