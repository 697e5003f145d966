"""Weights as safetensors beside a JSON description that says how to rebuild the architecture."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..artifacts import Store, tensors_of
from ..elastic.subnet import Subnet
from ..elastic.supernet import Supernet
from ..errors import ConfigError, ExportError, StorageError

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"

#: What model.json says it is; a reader refuses a format that it does not know.
FORMAT = "stp_ray.model/1"

_REQUIRED = {"model": dict, "num_classes": int, "image_size": int, "space": dict, "subnet": dict}


def save_model(store: Store, module: nn.Module, description: Mapping[str, Any]) -> dict[str, str]:
    """Write `model.safetensors` and then `model.json`: a model that can be loaded again.

    Args:
        store: where to; the description is written last, so that its presence means that
            the weights are complete.
        module: an extracted model; its state dict is written in float32 or whatever type
            it has, without sharing between tensors.
        description: what `load` needs to rebuild the architecture, JSON only:
            `model`: {"name", "kwargs"} of the dense model, `num_classes`, `image_size` in
            pixels, `space`: {"divisor", "min_ratio"}, and `subnet`: the JSON of
            the subnet, as text or as its parsed form. More keys may follow.

    Returns:
        The names of the files and their SHA-256.

    Raises:
        ExportError: a key is missing or a value is not JSON.
    """
    missing = [key for key in _REQUIRED if key not in description]
    if not missing and "name" not in description["model"]:
        missing = ["model.name"]
    if missing:
        raise ExportError(
            f"a model description lacks {', '.join(missing)}; expected the keys "
            f"{', '.join(_REQUIRED)}, with model = {{name, kwargs}}"
        )
    subnet = description["subnet"]
    if isinstance(subnet, str):
        subnet = json.loads(subnet)
    content = {
        **description,
        "format": FORMAT,
        "model": {"kwargs": {}, **description["model"]},
        "subnet": json.loads(Subnet.from_json(json.dumps(subnet)).to_json()),
    }
    try:
        content = json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ExportError(f"a model description is not JSON: {error}") from error
    tensors = {
        # Cloned, because safetensors refuses tensors that share memory.
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }
    weights = store.save_tensors(WEIGHTS, tensors)
    content["weights_sha256"] = weights
    return {WEIGHTS: weights, DESCRIPTION: store.write_json(DESCRIPTION, content)}


def load(uri: str, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """A pruned model back from the folder that `save_model` wrote, in evaluation mode.

    The dense architecture is built again, sliced to the subnet, and given the weights.
    Nothing is unpickled and no import path read from storage is followed.

    Args:
        uri: the folder of model.safetensors and model.json, on any storage.
        factory: builds the dense model where it is your own; called with the keyword
            arguments of the run's `model.kwargs`, and num_classes and image_size where it
            takes them.

    Raises:
        StorageError: a file is missing, damaged, or of another format.
        ConfigError: the model is your own and no factory was passed.
    """
    store = Store(uri)
    if not store.exists(DESCRIPTION):
        raise StorageError(
            f"{store.uri} has no {DESCRIPTION}; expected the folder of a pruned network, such as "
            "<run>/budget-0.15"
        )
    content = store.read_json(DESCRIPTION)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise StorageError(
            f"{store.uri}/{DESCRIPTION} has the format {found!r}; expected {FORMAT!r}; "
            "load it with the version of stp_ray that wrote it"
        )
    if missing := [key for key in _REQUIRED if key not in content]:
        raise StorageError(
            f"{store.uri}/{DESCRIPTION} lacks {', '.join(missing)}; expected the file as it was "
            "written; copy it again"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(content[key], kind):
            raise StorageError(
                f"{store.uri}/{DESCRIPTION} says {key}: {content[key]!r:.80}; expected the file as "
                "it was written; copy it again"
            )
    dense = _dense(content, factory)
    size = content["image_size"]
    try:
        net = Supernet.trace(dense, torch.zeros(1, 3, size, size), **content["space"])
        subnet = Subnet.from_json(json.dumps(content["subnet"]))
    except (TypeError, ValueError) as error:
        raise StorageError(
            f"{store.uri}/{DESCRIPTION} describes no network: {error}; expected the file as it was "
            "written; copy it again"
        ) from error
    try:
        net.space.validate(subnet)
        module = net.extract(subnet)
        module.load_state_dict(_weights(store, content.get("weights_sha256")))
    except (RuntimeError, ValueError) as error:
        raise StorageError(
            f"{store.uri} does not fit the model {content['model']['name']!r}: "
            f"{' '.join(str(error).split())[:200]}; build the same dense model that was trained"
        ) from error
    return module.eval()


def _weights(store: Store, written: str | None) -> dict[str, Tensor]:
    """The weights, which have to be those that the description was written with; ones that were
    written before descriptions said so are taken as they are."""
    data = store.read_bytes(WEIGHTS)
    found = hashlib.sha256(data).hexdigest()
    if written is not None and found != written:
        raise StorageError(
            f"{store.uri}/{WEIGHTS} has the SHA-256 {found[:12]}; expected {str(written)[:12]}, as "
            f"{DESCRIPTION} says: it was damaged or replaced; copy both files again"
        )
    return tensors_of(data, f"{store.uri}/{WEIGHTS}")


def _dense(content: Mapping[str, Any], factory: Callable[..., nn.Module] | None) -> nn.Module:
    name, kwargs = content["model"].get("name"), content["model"].get("kwargs")
    if not isinstance(name, str) or not isinstance(kwargs, dict):
        raise StorageError(
            f"{DESCRIPTION} says model: {content['model']!r:.80}; expected a name and kwargs; copy "
            "it again"
        )
    sizes = {"num_classes": content["num_classes"], "image_size": content["image_size"]}
    if factory is not None:
        return models.build_with(factory, name, sizes, kwargs)
    if ":" in name:
        raise ConfigError(
            f"the model is {name!r}, which is not ours; expected a function that builds it, for "
            "an import path read from storage is never followed; pass it as factory=, or --factory "
            "on the command line"
        )
    return models.build_for(name, sizes, models.untrained(name, kwargs))
