"""What is switched inside is back afterwards, whatever happened."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stp_ray.elastic.attention import unfused_attention
from stp_ray.method.modes import inspecting

mha = torch.backends.mha


def test_attention_is_counted_and_the_switch_is_back_afterwards():
    module, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.zeros(1, 5, 16)
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(True)
    try:
        with pytest.raises(KeyError), inspecting(module), unfused_attention():
            with FlopCounterMode(display=False) as counter:
                module(x, x, x, need_weights=False)
            raise KeyError
        assert mha.get_fastpath_enabled()
    finally:
        mha.set_fastpath_enabled(before)
    projections, products = 4 * 5 * 16 * 16, 2 * 5 * 5 * 16
    assert counter.get_total_flops() == 2 * (projections + products)
    assert module.training and module.out_proj.training
