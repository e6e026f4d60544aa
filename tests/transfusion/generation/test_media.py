"""Pictures and masks, as the pipeline reads them: the pixels that training reads of the same file."""

import pytest
import torch
from PIL import Image

from transfusion.data.sources import open_rgb
from transfusion.data.transforms import to_tensor
from transfusion.generation.media import to_pixels, to_unknown

TURNED = 6  # of EXIF: to be turned a quarter clockwise


def noise(mode, size):
    """A picture of `mode` with other values everywhere, half of it transparent where the mode can say so."""
    width, height = size
    channels = torch.randint(0, 256, (height, width, 4), dtype=torch.uint8)
    channels[: height // 2, :, 3] = 0
    return Image.fromarray(channels.numpy(), "RGBA").convert(mode)


def save_turned(picture, path):
    exif = Image.Exif()
    exif[0x0112] = TURNED
    picture.save(path, exif=exif)
    return path


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "RGB", "P"])
def test_a_picture_is_read_as_in_training(mode, tmp_path, seed):
    torch.manual_seed(seed)
    picture = noise(mode, (17, 12))
    if mode == "P":
        picture.info["transparency"] = 3
    path = save_turned(picture, tmp_path / "picture.png")
    expected = to_tensor(open_rgb(path, "picture"), (8, 6))
    assert torch.equal(to_pixels(path, (8, 6)), expected), seed
    assert torch.equal(to_pixels(Image.open(path), (8, 6)), expected), seed


def test_what_is_transparent_is_white():
    assert (to_pixels(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (2, 2)) == 1).all()


def test_a_mask_is_upright_too(tmp_path):
    mask = Image.new("L", (6, 4))
    mask.putpixel((0, 0), 255)
    path = save_turned(mask, tmp_path / "mask.png")
    for picture in (path, Image.new("RGB", (4, 6)), torch.zeros(3, 6, 4)):
        assert to_unknown(path, picture, (6, 4), (6, 4)).nonzero().tolist() == [[0, 0, 3]]


def test_a_mask_of_another_size_than_its_picture_is_refused():
    """Each would be cropped by itself: a mask's left half would lie elsewhere in the picture."""
    wide, square = Image.new("RGB", (12, 6)), Image.new("L", (6, 6))
    with pytest.raises(ValueError, match=r"mask is 6×6 pixels and its image 12×6.*give a mask of the image's size"):
        to_unknown(square, wide, (6, 6), (6, 6))
    with pytest.raises(ValueError, match="mask is 6×6 pixels and its image 4×6"):
        to_unknown(square, torch.zeros(3, 6, 4), (6, 4), (6, 4))
    square.paste(255, (0, 0, 1, 6))
    marked = to_unknown(square.crop((-3, 0, 9, 6)), wide, (6, 6), (6, 6))  # its left edge is that of what is kept
    assert marked[0, :, 0].all() and not marked[0, :, 1:].any()
    assert to_unknown(torch.ones(6, 6), wide, (6, 6), (6, 6)).all()  # a tensor is of what is kept


def test_pictures_are_cropped_and_resized_and_tensors_are_not():
    assert to_pixels(Image.new("RGB", (17, 13)), (4, 4)).shape == (3, 4, 4)
    tensor = torch.rand(3, 4, 6)
    assert torch.equal(to_pixels(tensor, (4, 6)), tensor * 2 - 1)
