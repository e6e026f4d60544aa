import numpy as np
import pytest
import torch
from PIL import Image

from transfusion.data.transforms import bucket_sizes, check_image_size, to_image, to_tensor


@pytest.mark.parametrize("size", [1, 5, 32])
def test_a_square_of_the_right_size_passes_unchanged(size):
    pixels = np.random.default_rng().integers(0, 256, (size, size, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels), size)
    assert tensor.shape == (3, size, size) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(np.asarray(to_image(tensor)), pixels)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).double() * 2 / 255 - 1
    assert (tensor.double() - expected).abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("width", "height"), [(12, 8), (8, 12), (13, 8), (8, 8)])
def test_the_centre_is_cropped(width, height):
    pixels = np.random.default_rng().integers(0, 256, (height, width, 3), dtype=np.uint8)
    left, top = (width - 8) // 2, (height - 8) // 2
    tensor = to_tensor(Image.fromarray(pixels), 8)
    assert np.array_equal(np.asarray(to_image(tensor)), pixels[top : top + 8, left : left + 8])


def test_black_and_white_are_the_ends_of_the_range():
    assert (to_tensor(Image.new("RGB", (9, 5), "white"), 4) == 1).all()
    assert (to_tensor(Image.new("L", (9, 5), 0), 4) == -1).all()


def test_one_pixel_and_extreme_aspect_ratios_are_resized():
    for size in ((1, 1), (1, 500), (500, 1)):
        assert to_tensor(Image.new("RGB", size, "white"), 16).shape == (3, 16, 16)


def test_values_outside_the_range_are_clamped():
    assert to_image(torch.tensor([-3.0, 0.0, 7.0]).view(3, 1, 1)).getpixel((0, 0)) == (0, 128, 255)


def test_odd_sizes_are_refused_with_a_size_that_works():
    check_image_size(32, 1, 8)
    check_image_size(256, 8, 2)
    with pytest.raises(ValueError, match=r"image_size=33 .* 8 pixels .* use e\.g\. 32"):
        check_image_size(33, 1, 8)
    with pytest.raises(ValueError, match=r"image_size=0 .* use e\.g\. 16"):
        check_image_size(0, 8, 2)
    with pytest.raises(ValueError, match="got 0"):
        to_tensor(Image.new("RGB", (3, 3)), 0)
    with pytest.raises(ValueError, match=r"\(1, 3, 3\)"):
        to_image(torch.zeros(1, 3, 3))


@pytest.mark.parametrize("ratio", ["4", "4:", "0:1", "-4:3", "4:3:2", "²:1", "wide"])
def test_an_aspect_ratio_that_is_none_is_named(ratio):
    with pytest.raises(ValueError, match=f'such as "4:3", got {ratio!r}'):
        bucket_sizes(("1:1", ratio), 64, 8)
