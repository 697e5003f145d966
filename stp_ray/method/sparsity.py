"""The relative sparsity effect: how the kept weights grow against the dropped ones."""

import torch

from ..elastic.subnet import Subnet
from ..elastic.supernet import Supernet


@torch.no_grad()
def relative_sparsity(net: Supernet, target: Subnet) -> dict[str, float]:
    """Mean L2 norm per channel inside and outside the target's slice [paper].

    A channel is one index along a dimension that the target cuts; its norm is taken over
    all other dimensions in full, so that channels inside and outside are compared at equal
    length. Every cut dimension of every weight tensor counts the same [ours]; layers that go
    with a dropped block have no channel inside to compare with and are left out.

    Args:
        net: the supernet with the weights to look at.
        target: the subnet whose slice is measured.

    Returns:
        "kept_norm", "dropped_norm" and their "ratio"; nothing if the target cuts no weight.
    """
    parameters = dict(net.model.named_parameters())
    gone = tuple(
        f"{layer}."
        for block in net.space.blocks
        if block.name in target.dropped
        for layer in block.layers
    )
    inside, outside = [], []
    for name, cuts in net.slices(target).items():
        weight = parameters.get(name)
        if weight is None or weight.ndim < 2 or f"{name}.".startswith(gone):
            continue
        for dim, ranges in cuts.items():
            rest = [d for d in range(weight.ndim) if d != dim]
            norms = torch.linalg.vector_norm(weight.detach().float(), dim=rest)
            kept = torch.zeros(len(norms), dtype=torch.bool, device=norms.device)
            for start, stop in ranges:
                kept[start:stop] = True
            if kept.all() or not kept.any():
                continue
            inside.append(norms[kept].mean())
            outside.append(norms[~kept].mean())
    if not inside:
        return {}
    kept_norm, dropped_norm = torch.stack(
        [torch.stack(inside).mean(), torch.stack(outside).mean()]
    ).tolist()
    ratio = kept_norm / dropped_norm if dropped_norm else float("inf")
    return {"kept_norm": kept_norm, "dropped_norm": dropped_norm, "ratio": ratio}
