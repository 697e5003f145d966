"""Encoded images to uint8 RGB arrays of one square size.

JPEG goes through torchvision where it can decode, everything else through Pillow. On the 32x32
JPEG files of CIFAR-10 torchvision takes 35 us an image and Pillow 155 us, for the same pixels.
"""

import io
import math
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from ..errors import DataError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 announces that a later version drops them.
    decode_jpeg = None

_JPEG = b"\xff\xd8"
#: Formats whose grey images of 16 bits Pillow opens in mode "I", or did in earlier releases.
_SIXTEEN_BITS = frozenset({"PNG", "PPM"})
#: Images that are decoded before they are copied to their place: so few that the next ones reuse
#: their memory, for fresh memory costs as much as half of the decoding.
_AT_A_TIME = 32
#: And so few bytes of files: a photograph has ten times as many once it is decoded, or far more.
_BYTES_AT_A_TIME = 1 << 20
#: Thinner images are cut to this before they are scaled, or a line of pixels would take gigabytes.
_THINNEST = 8
#: What no image has in truth: a damaged header would have a decoder take gigabytes, or hours for
#: one line. Pillow has the first limit for the formats that it reads itself.
_MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else math.inf
_LONGEST_SIDE = 65_535
_PILLOW_ERRORS = (
    OSError,
    RuntimeError,  # of AVIF, and NotImplementedError of DDS
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode(
    encoded: Sequence[bytes | None],
    size: int,
    *,
    resize: bool,
    out: NDArray[np.uint8] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Decode images; what cannot be decoded is left out and marked.

    Args:
        encoded: contents of image files (JPEG, PNG, ... colour or grey, of up to 16 bits); None
            counts as corrupt, and so do 32 bits a pixel, which do not say what white is.
        size: height and width of the result in pixels.
        resize: bring images of any shape to `size` (see `fit`); otherwise they must have it.
        out: what `blank` made for N images or more, to be written over; None: fresh memory, which
            costs a fifth of the decoding.

    Returns:
        uint8 RGB [n, 3, size, size] of the n readable images in order, with channels last in
        memory as decoders write them, and a mask bool [N] of which of the N images those are.

    Raises:
        DataError: an image has another size and `resize` is off.
    """
    images = blank(len(encoded), size) if out is None else out
    mask = np.zeros(len(encoded), dtype=np.bool_)
    count = 0
    for rows in _groups(encoded):
        for row, image in zip(rows, _raw([encoded[row] for row in rows]), strict=True):
            if image is not None:
                images[count] = _fitted(image, size, resize).numpy()
                mask[row] = True
                count += 1
    return images[:count], mask


def _groups(encoded: Sequence[bytes | None]) -> Iterator[list[int]]:
    """The rows that are decoded together, at least one at a time."""
    rows: list[int] = []
    total = 0
    for row, data in enumerate(encoded):
        total += len(data or b"")
        if rows and (len(rows) == _AT_A_TIME or total > _BYTES_AT_A_TIME):
            yield rows
            rows, total = [], len(data or b"")
        rows.append(row)
    if rows:
        yield rows


def blank(count: int, size: int) -> NDArray[np.uint8]:
    """Room for images, uint8 [count, 3, size, size], with channels last in memory."""
    return np.empty((count, size, size, 3), dtype=np.uint8).transpose(0, 3, 1, 2)


def fit(images: Tensor, size: int) -> Tensor:
    """Scale the shorter side to `size` pixels and keep the centre: [..., 3, size, size]."""
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    shorter = min(height, width)
    if max(height, width) > _THINNEST * shorter:
        height, width = (min(side, _THINNEST * shorter) for side in (height, width))
        images = functional.center_crop(images, [height, width])
    target = [max(size, round(side * size / shorter)) for side in (height, width)]
    return functional.center_crop(functional.resize(images, target, antialias=True), [size, size])


def image_shape(encoded: bytes | None) -> tuple[int, int] | None:
    """Height and width in pixels of an encoded image, or None if it is not readable."""
    image = _raw([encoded])[0]
    return None if image is None else (image.shape[1], image.shape[2])


def _raw(encoded: Sequence[bytes | None]) -> list[Tensor | None]:
    """uint8 RGB [3, H, W] of each image at its own size; None where it cannot be decoded."""
    images: list[Tensor | None] = [None] * len(encoded)
    jpegs = [
        i for i, data in enumerate(encoded)
        if data is not None and data[:2] == _JPEG and _jpeg_pixels(data) <= _MOST_PIXELS
    ]  # fmt: skip
    for index, image in zip(jpegs, _jpegs([encoded[i] or b"" for i in jpegs]), strict=True):
        images[index] = image
    for index, data in enumerate(encoded):
        if images[index] is None and data:
            images[index] = _pillow(data)
    return images


def _jpeg_pixels(data: bytes) -> int:
    """Pixels of a JPEG by its header; 0 where that is for the decoder to say."""
    at = len(_JPEG)
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of a frame
            height, width = struct.unpack_from(">HH", data, at + 5)
            return int(height) * int(width)
        if marker == 0xFF:  # padding
            at += 1
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return 0


def _jpegs(encoded: list[bytes]) -> list[Tensor | None]:
    """All of a list at once; a list with a bad image fails as a whole and is halved."""
    if not encoded or decode_jpeg is None:
        return [None] * len(encoded)
    buffers = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded]
    try:
        return list(decode_jpeg(buffers, mode=ImageReadMode.RGB))
    except RuntimeError:
        middle = len(encoded) // 2
        return [None] if middle == 0 else _jpegs(encoded[:middle]) + _jpegs(encoded[middle:])


def _pillow(data: bytes) -> Tensor | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if max(image.size) > _LONGEST_SIDE:
                raise ValueError(f"{image.size} pixels")
            pixels = np.array(_eight_bits(image).convert("RGB"))
    except _PILLOW_ERRORS:
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The same image with grey values of 16 bits scaled to 8, where Pillow would clip them.

    Raises:
        ValueError: its values have 32 bits and no range that is known.
    """
    sixteen = image.mode == "I" and image.format in _SIXTEEN_BITS
    if sixteen or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no range; expected 8 or 16 bits")
    return image


def _fitted(image: Tensor, size: int, resize: bool) -> Tensor:
    if resize:
        return fit(image, size)
    height, width = image.shape[-2:]
    if (height, width) != (size, size):
        raise DataError(
            f"images differ in size ({size}x{size} and {width}x{height} pixels); expected one "
            "size; set data.image_size to scale them all"
        )
    return image
