"""Attention with fewer heads than the embedding has room for.

The stock modules assume heads x head size = embedding, so a layer that lost heads needs a
forward of its own. The classes below are never constructed: a narrowed layer takes over the
attributes of the stock layer that it came from, and with them its parameter names.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Inside, torch runs multi-head attention of evaluation as the operations that it is made of,
    which can be exported and whose MACs torch counts, and not as its one fused operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class MultiheadSelfAttention(nn.Module):
    """`torch.nn.MultiheadAttention` for query = key = value, with any number of heads.

    Input [B, L, E] where `batch_first`, else [L, B, E]; output (same shape, None). Raises
    ValueError for another key or value than the query, and for a mask.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    out_proj: nn.Linear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: None = None,
        need_weights: bool = False,
        attn_mask: None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if key is not query or value is not query:
            raise ValueError(
                "attention that lost heads got another key or value than the query; expected "
                "the query itself as all three; keep the layer whole with ignore="
            )
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ValueError(
                "attention that lost heads got a mask; expected none; keep the layer whole with "
                "ignore="
            )
        x_ble = query if self.batch_first else query.transpose(0, 1)
        batch, tokens, _ = x_ble.shape
        qkv = F.linear(x_ble, self.in_proj_weight, self.in_proj_bias)
        q_bhld, k_bhld, v_bhld = (
            qkv.reshape(batch, tokens, 3, self.num_heads, self.head_dim)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q_bhld, k_bhld, v_bhld, dropout_p=dropout)
        out = self.out_proj(heads.transpose(1, 2).reshape(batch, tokens, -1))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"


class WindowSelfAttention(nn.Module):
    """torchvision's `ShiftedWindowAttention` with any number of heads.

    Input and output [B, H, W, C]. Attention runs inside windows of `window_size` pixels,
    cyclically shifted by `shift_size` (Swin Transformer, Liu et al. 2021).
    """

    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    head_dim: int
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Linear
    relative_position_bias_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        rows, columns = self.window_size
        padded = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        batch, full_height, full_width, _ = padded.shape
        # A window as large as the image leaves nothing to shift into.
        shift = [
            0 if window >= size else step
            for step, window, size in zip(
                self.shift_size, self.window_size, (full_height, full_width), strict=True
            )
        ]
        if any(shift):
            padded = padded.roll((-shift[0], -shift[1]), dims=(1, 2))
        down, across = full_height // rows, full_width // columns
        area = rows * columns

        windows = padded.reshape(batch, down, rows, across, columns, -1).permute(0, 1, 3, 2, 4, 5)
        windows = windows.reshape(batch * down * across, area, -1)
        q, k, v = (
            F.linear(windows, self.qkv.weight, self._qkv_bias())
            .reshape(windows.shape[0], area, 3, self.num_heads, self.head_dim)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        table = self._position_biases()[self.relative_position_index]
        scores = self._scores(q, k) + table.view(area, area, -1).permute(2, 0, 1)
        if any(shift):
            mask = _shift_mask(x, (full_height, full_width), self.window_size, shift)
            scores = scores.view(batch, down * across, self.num_heads, area, area)
            scores = (scores + mask[:, None]).view(-1, self.num_heads, area, area)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        out = self.proj((weights @ v).transpose(1, 2).reshape(windows.shape[0], area, -1))
        out = F.dropout(out, self.dropout, self.training)

        out = out.reshape(batch, down, across, rows, columns, -1).permute(0, 1, 3, 2, 4, 5)
        out = out.reshape(batch, full_height, full_width, -1)
        if any(shift):
            out = out.roll((shift[0], shift[1]), dims=(1, 2))
        return out[:, :height, :width].contiguous()

    def _qkv_bias(self) -> Tensor | None:
        return self.qkv.bias

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[windows, heads, A, A] for queries and keys [windows, heads, A, head size]."""
        return (q * self.head_dim**-0.5) @ k.transpose(-2, -1)

    def _position_biases(self) -> Tensor:
        """[relative positions, heads]."""
        return self.relative_position_bias_table

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"window_size={list(self.window_size)}, shift_size={list(self.shift_size)}"
        )


class WindowSelfAttentionV2(WindowSelfAttention):
    """torchvision's `ShiftedWindowAttentionV2` with any number of heads: cosine attention with a
    temperature for each head, biases from a network of the position (Liu et al. 2022)."""

    logit_scale: Tensor
    cpb_mlp: nn.Sequential
    relative_coords_table: Tensor

    def _qkv_bias(self) -> Tensor | None:
        if self.qkv.bias is None:
            return None
        query, key, value = self.qkv.bias.chunk(3)
        return torch.cat([query, torch.zeros_like(key), value])

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosines * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()

    def _position_biases(self) -> Tensor:
        out = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * torch.sigmoid(out)


def _shift_mask(like: Tensor, size: tuple[int, int], window: list[int], shift: list[int]) -> Tensor:
    """-100 between pixels that are neighbours only through the cyclic shift; [windows, A, A]."""
    regions = like.new_zeros(size)
    count = 0
    for down in (slice(-window[0]), slice(-window[0], -shift[0]), slice(-shift[0], None)):
        for across in (slice(-window[1]), slice(-window[1], -shift[1]), slice(-shift[1], None)):
            regions[down, across] = count
            count += 1
    height, width = size
    regions = regions.view(height // window[0], window[0], width // window[1], window[1])
    regions = regions.permute(0, 2, 1, 3).reshape(-1, window[0] * window[1])
    apart = regions[:, None, :] != regions[:, :, None]
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, -100.0)
