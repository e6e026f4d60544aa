"""The size that a file's header tells is that of the picture as it is shown, whatever the format and its turn."""

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from transfusion.data.sources import CaptionedImage, FileSlice

XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def save(path, kind, turn):
    image, exif = Image.new("RGB", (80, 40), "orange"), Image.Exif()
    exif[0x0112] = turn
    if kind == "tiff":
        image.save(path, "TIFF", tiffinfo={0x0112: turn})
    elif kind == "png, in XMP":
        said = PngInfo()
        said.add_itxt("XML:com.adobe.xmp", XMP.format(turn))
        image.save(path, "PNG", pnginfo=said)
    elif kind == "png, behind the pixels":  # as ImageMagick writes it
        image.save(path, "PNG", exif=exif)
        content = path.read_bytes()
        start = content.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        last = content.index(b"IEND") - 4
        path.write_bytes(content[:start] + content[end:last] + content[start:end] + content[last:])
    else:
        image.save(path, kind.upper(), exif=exif)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "webp", "png", "tiff", "png, in XMP", "png, behind the pixels"])
def test_the_size_before_decoding_is_the_size_after(tmp_path, kind, turn):
    save(tmp_path / "picture", kind, turn)
    sample = CaptionedImage("orange", FileSlice(tmp_path / "picture"), "picture")
    assert sample.size == sample.image.size == ((40, 80) if turn > 4 else (80, 40))
