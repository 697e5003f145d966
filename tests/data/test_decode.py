import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from stp_ray.data import decode as decoding
from stp_ray.data.decode import decode, fit, image_shape
from stp_ray.errors import DataError
from tests.data.samples import encode, pixels


def test_png_keeps_every_pixel():
    images = pixels(5)
    decoded, mask = decode([encode(image) for image in images], 8, resize=False)
    assert mask.all()
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, images)


@pytest.mark.parametrize("with_torchvision", [True, False])
def test_jpeg_decodes_as_pillow_does(with_torchvision, monkeypatch):
    if not with_torchvision:
        monkeypatch.setattr("stp_ray.data.decode.decode_jpeg", None)
    files = [encode(image, "JPEG") for image in pixels(9, 32)]
    decoded, mask = decode(files, 32, resize=False)
    expected = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    assert mask.all()
    np.testing.assert_array_equal(decoded, np.stack(expected).transpose(0, 3, 1, 2))


def claims(height, width, **options):
    """A JPEG whose header says another size than it has."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(1, 64)[0].transpose(1, 2, 0)).save(buffer, "JPEG", **options)
    file = bytearray(buffer.getvalue())
    at = file.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0")
    file[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(file)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_header_that_claims_gigabytes_is_no_image(progressive, monkeypatch):
    asked = []
    real = decoding.decode_jpeg
    monkeypatch.setattr(
        decoding, "decode_jpeg", lambda data, mode: asked.append(data) or real(data, mode=mode)
    )
    exif = Image.Exif()
    exif[0x010E] = "before the frame \xff\xc0"
    huge = claims(65_500, 65_500, progressive=progressive, exif=exif)
    whole = claims(64, 64, progressive=progressive, exif=exif)
    decoded, mask = decode([whole, huge, whole], 64, resize=True)
    assert mask.tolist() == [True, False, True] and len(decoded) == 2
    assert [len(data) for data in asked] == [2], "the decoder does not see it"


def test_no_limit_of_pillow_is_none_of_ours():
    code = (
        "from PIL import Image\nImage.MAX_IMAGE_PIXELS = None\n"
        "from stp_ray.data import decode\nassert decode._MOST_PIXELS > 1e12"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_line_that_is_longer_than_any_is_no_image():
    buffer = io.BytesIO()
    Image.new("L", (70_000, 1)).save(buffer, "PNG")
    assert not decode([buffer.getvalue()], 8, resize=True)[1].any()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(mode):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels(1)[0].transpose(1, 2, 0)).convert(mode)
    image.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    decoded, mask = decode([buffer.getvalue()], 8, resize=False)
    assert mask.all()
    assert decoded.shape == (1, 3, 8, 8)


GREY = np.arange(0, 256, 4, dtype=np.uint16).reshape(8, 8)


def saved(pixels, kind):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "opened"), [("PNG", "I;16"), ("PNG", "I"), ("TIFF", "I;16"), ("PPM", "I")]
)
def test_grey_of_16_bits_is_scaled_and_not_clipped(kind, opened, monkeypatch):
    if kind == "PNG":  # releases of Pillow differ in it
        monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), (opened, "I;16B"))
    file = saved(GREY * 257, kind)
    assert Image.open(io.BytesIO(file)).mode == opened
    decoded, mask = decode([file], 8, resize=False)
    assert mask.all()
    for channel in decoded[0]:
        np.testing.assert_array_equal(channel, GREY)
    white, _ = decode([saved(np.full((8, 8), 65535, np.uint16), kind)], 8, resize=False)
    assert (white == 255).all()


def test_grey_of_16_bits_is_scaled_in_either_order_of_bytes():
    buffer = io.BytesIO()
    Image.frombytes("I;16B", (8, 8), (GREY * 257).astype(">u2").tobytes()).save(buffer, "TIFF")
    assert Image.open(io.BytesIO(buffer.getvalue())).mode == "I;16B"
    decoded, _ = decode([buffer.getvalue()], 8, resize=False)
    np.testing.assert_array_equal(decoded[0, 0], GREY)


@pytest.mark.parametrize("pixels", [np.float32(GREY) / 255, np.int32(GREY)])
def test_grey_of_32_bits_has_no_range_and_counts_as_unreadable(pixels):
    file = saved(pixels, "TIFF")
    _, mask = decode([file, saved(np.uint8(GREY), "TIFF")], 8, resize=False)
    assert mask.tolist() == [False, True]
    assert image_shape(file) is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_what_cannot_be_decoded_is_left_out_and_marked(kind):
    good = [encode(image, kind) for image in pixels(4, 32)]
    files = [good[0], None, b"", b"not an image", good[1], good[2][: len(good[2]) // 2], good[3]]
    decoded, mask = decode(files, 32, resize=False)
    assert mask.tolist() == [True, False, False, False, True, False, True]
    np.testing.assert_array_equal(decoded, decode([good[0], good[1], good[3]], 32, resize=False)[0])


@pytest.mark.skipif(not features.check("avif"), reason="a Pillow without AVIF")
def test_a_damaged_avif_is_left_out():
    """Its decoder raises RuntimeError."""
    good = encode(pixels(1, 16)[0], "AVIF")
    start = good.index(b"mdat") + 8
    damaged = good[:start] + bytes(byte ^ 0xFF for byte in good[start : start + 30])
    _, mask = decode([damaged + good[start + 30 :], good], 16, resize=False)
    assert mask.tolist() == [False, True]


def test_many_images_are_decoded_as_each_of_them_is():
    """They are decoded a few at a time, and what is left out moves the others up."""
    files = [encode(image, "JPEG") for image in pixels(71, 16)]
    for row in (0, 31, 32, 50):
        files[row] = b"damaged"
    decoded, mask = decode(files, 16, resize=False)
    assert np.flatnonzero(~mask).tolist() == [0, 31, 32, 50]
    alone = [decode([file], 16, resize=False)[0] for file in files]
    np.testing.assert_array_equal(decoded, np.concatenate(alone))


def test_large_files_are_decoded_few_at_a_time(monkeypatch):
    """32 photographs of 24 megapixels are 2.3 GB."""
    from stp_ray.data import decode as module

    together = []
    raw = module._raw
    monkeypatch.setattr(module, "_raw", lambda files: (together.append(len(files)), raw(files))[1])
    files = [encode(image, "JPEG") for image in pixels(40, 16)]
    # readers pass over what follows the image
    large = [file + bytes(400_000) for file in files[:5]]
    decoded, _ = decode([*files, *large], 16, resize=False)
    assert together == [32, 10, 2, 1]
    np.testing.assert_array_equal(decoded[40:], decoded[:5])


@pytest.mark.parametrize("shape", [(1, 400), (400, 1), (2, 90)])
def test_a_thin_image_is_cut_before_it_is_scaled(shape, monkeypatch):
    """A line of 20,000 pixels would have become 3 GB."""
    from stp_ray.data import decode as module

    sizes = []
    resize = module.functional.resize
    monkeypatch.setattr(
        module.functional, "resize",
        lambda image, size, **more: (sizes.append(size), resize(image, size, **more))[1],
    )  # fmt: skip
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    places = [slice(side // 2 - 1, side // 2 + 1) if side > 2 else slice(side) for side in shape]
    image[:, *places] = 255
    fitted = fit(image, 32)
    assert fitted.shape == (3, 32, 32) and fitted[:, 16, 16].min() > 200
    assert max(sizes[0]) <= 8 * 32


def test_nothing_readable_gives_an_empty_array():
    decoded, mask = decode([b"x", None], 16, resize=True)
    assert decoded.shape == (0, 3, 16, 16)
    assert not mask.any()


def test_another_size_is_a_mistake_unless_images_are_resized():
    files = [encode(pixels(1, 8)[0]), encode(pixels(1, 9)[0])]
    with pytest.raises(DataError, match=r"8x8 and 9x9 .* set data\.image_size"):
        decode(files, 8, resize=False)
    assert decode(files, 12, resize=True)[0].shape == (2, 3, 12, 12)


@pytest.mark.parametrize("shape", [(8, 8), (10, 31), (31, 10), (3, 4)])
def test_fit_keeps_the_centre_of_the_shorter_side(shape):
    image = torch.zeros(1, 3, *shape, dtype=torch.uint8)
    image[..., shape[0] // 2, shape[1] // 2] = 255
    fitted = fit(image, 7)
    assert fitted.shape == (1, 3, 7, 7)
    assert fitted[..., 2:5, 2:5].max() == fitted.max() > 0


def test_shape_of_an_image():
    assert image_shape(encode(pixels(1, 8)[0])) == (8, 8)
    assert image_shape(b"nothing") is None


def test_an_image_is_smoothed_before_it_is_made_smaller():
    stripes = (torch.arange(70) % 2 * 255).to(torch.uint8).expand(1, 3, 70, 70)
    assert (fit(stripes, 10).int() - 127).abs().max() <= 20
