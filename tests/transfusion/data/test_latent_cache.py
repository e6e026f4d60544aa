import json
import logging
import random
from itertools import islice
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from transfusion.data import latent_cache
from transfusion.data.autoencoder import DiffusersAutoencoder
from transfusion.data.latent_cache import LatentCache, encode_images
from transfusion.data.loader import Loader, LoaderConfig
from transfusion.data.sources import CaptionedImage, FolderSource, SampleError
from transfusion.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["red green blue"] * 3, 320)
CONFIG = LoaderConfig(rows=4, row_length=48, image_size=16, patch_size=4, text_fraction=0.0)
COUNT = 11


def save_vae(path, seed: int, **config) -> DiffusersAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            latent_channels=4,
            norm_num_groups=4,
            **config,
        )
    vae.save_pretrained(path)
    return DiffusersAutoencoder(path)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"), 1, scaling_factor=0.7, shift_factor=0.1)


@pytest.fixture
def folder(tmp_path):
    """Eleven images of random pixels and sizes, one of them cut short."""
    path, lines = tmp_path / "images", []
    path.mkdir()
    for index in range(COUNT):
        shape = (random.randint(17, 40), random.randint(17, 40), 3)
        Image.fromarray(np.random.default_rng().integers(0, 256, shape, dtype=np.uint8)).save(path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "caption": random.choice(["red", "green blue"])}))
    (path / "captions.jsonl").write_text("\n".join(lines))
    cut = path / "4.png"
    cut.write_bytes(cut.read_bytes()[:200])
    return path


def _samples(folder):
    source = FolderSource(folder, "all")
    return (source[index] for index in range(len(source)))


@pytest.fixture
def filled(folder, vae, tmp_path):
    cache = LatentCache(tmp_path / "cache", vae.fingerprint)
    count, skipped = encode_images(_samples(folder), [(16, 16)], vae, cache, shard_entries=4)
    assert count == len(cache) == COUNT - 1 and [name for name, _ in skipped] == [str(folder / "4.png")]
    return cache


def _loader(folder, vae, cache=None, **changes) -> Loader:
    config = LoaderConfig(**{**vars(CONFIG), **changes})
    return Loader(config, TOKENIZER, FolderSource(folder, "all"), None, vae, cache=cache)


def _poison(monkeypatch, vae) -> None:
    def encoded(images):
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(vae, "moments", encoded)


@pytest.mark.parametrize("sample_latents", [False, True])
def test_cached_latents_are_those_of_encoding_on_the_fly_bit_for_bit(folder, vae, filled, sample_latents, monkeypatch):
    direct = list(islice(_loader(folder, vae, sample_latents=sample_latents).iterate(), 3))
    again = LatentCache(filled.folder.parent, vae.fingerprint)
    _poison(monkeypatch, vae)
    cached_loader = _loader(folder, vae, again, sample_latents=sample_latents)
    cached = list(islice(cached_loader.iterate(), 3))
    for a, b in zip(direct, cached, strict=True):
        assert a.num_images > 0 and torch.equal(a.latents, b.latents) and torch.equal(a.token_ids, b.token_ids)
    assert [name for name, _ in cached_loader.skipped] == [str(folder / "4.png")]


def test_a_gpu_encodes_beside_the_training_step(folder, vae, monkeypatch):
    """On the step's own stream every image would wait for all that is queued there."""
    loader = _loader(folder, vae)
    wanted = loader.batch(0).latents
    monkeypatch.setattr(type(vae), "device", property(lambda self: torch.device("cuda:1")))
    monkeypatch.setattr(torch, "cuda", MagicMock())
    inside = []
    torch.cuda.stream.return_value.__enter__ = lambda each: inside.append(1)
    torch.cuda.stream.return_value.__exit__ = lambda each, *error: inside.pop() and None
    genuine = vae.encode

    def encode(images, draws):
        assert inside == [1]
        with monkeypatch.context() as patch:
            patch.setattr(type(vae), "device", property(lambda self: self._vae.device))
            return genuine(images, draws)

    monkeypatch.setattr(vae, "encode", encode)
    assert torch.equal(loader.batch(0).latents, wanted) and not inside
    torch.cuda.Stream.assert_called_once_with(torch.device("cuda:1"))
    assert torch.cuda.stream.call_args.args == (torch.cuda.Stream.return_value,)


def test_sampling_differs_from_the_mode_and_between_uses(folder, vae):
    mode, sampled = (_loader(folder, vae, sample_latents=s).batch(0).latents for s in (False, True))
    assert mode.shape == sampled.shape and not torch.equal(mode, sampled)


def test_encoding_goes_on_where_it_stopped_and_does_nothing_twice(folder, vae, tmp_path, monkeypatch):
    where = tmp_path / "cache"
    cache = LatentCache(where, vae.fingerprint)
    with pytest.raises(RuntimeError, match="killed"):
        encode_images(_killed_after(7, folder), [(16, 16)], vae, cache, shard_entries=3)
    (cache.folder / "latents-00002.tmp").write_bytes(b"half")
    again = LatentCache(where, vae.fingerprint, repair=True)
    assert len(again) == 6 and not list(again.folder.glob("*.tmp"))
    assert encode_images(_samples(folder), [(16, 16)], vae, again)[0] == COUNT - 1 - 6
    _poison(monkeypatch, vae)
    assert encode_images(_samples(folder), [(16, 16)], vae, again)[0] == 0


def _killed_after(count, folder):
    yield from islice(_samples(folder), count)
    raise RuntimeError("killed")


@pytest.mark.parametrize("damage", ["truncated", "one bit", "no safetensors"])
def test_a_damaged_shard_is_named_and_rebuilt(folder, vae, filled, damage, caplog):
    path = sorted(filled.folder.glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-5] ^= 4
    path.write_bytes({"truncated": content[:-50], "one bit": content, "no safetensors": b"hello"}[damage])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged .*transfusion encode"):
        cache = LatentCache(filled.folder.parent, vae.fingerprint)
        list(islice(_loader(folder, vae, cache).iterate(), 3))
    with caplog.at_level(logging.WARNING):
        repaired = LatentCache(filled.folder.parent, vae.fingerprint, repair=True)
    assert path.name in caplog.text and len(repaired) == COUNT - 1 - 4
    assert encode_images(_samples(folder), [(16, 16)], vae, repaired)[0] == 4


def test_an_image_that_changed_is_not_taken_for_the_old_one(folder, vae, filled):
    pixels = np.random.default_rng().integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "0.png")
    with pytest.raises(ValueError, match=r"0\.png is not in the latent cache .*transfusion encode"):
        list(islice(_loader(folder, vae, filled).iterate(), 6))


def test_another_encoder_and_another_size_find_nothing(folder, vae, filled, tmp_path):
    other = save_vae(tmp_path / "other", 2)
    assert other.fingerprint != vae.fingerprint
    assert len(LatentCache(filled.folder.parent, other.fingerprint)) == 0
    assert DiffusersAutoencoder(tmp_path / "other").fingerprint == other.fingerprint
    assert encode_images(_samples(folder), [(32, 32)], vae, filled)[0] == COUNT - 1


def test_a_full_disk_keeps_the_shards_before(filled, vae, monkeypatch):
    import safetensors.torch

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    before = sorted(filled.folder.iterdir())
    with pytest.raises(OSError, match=r"latents-00003\.safetensors: .*No space left"):
        filled.write({"a": torch.zeros(8, 2, 2)})
    assert sorted(filled.folder.iterdir()) == before


def test_a_sample_that_its_source_cannot_give_is_skipped_and_named(vae, tmp_path):
    samples = [SampleError("row 3", "holds no image"), CaptionedImage("", Image.new("RGB", (16, 16), "red"), "row 4")]
    cache = LatentCache(tmp_path / "cache", vae.fingerprint)
    assert encode_images(samples, [(16, 16)], vae, cache) == (1, [("row 3", "holds no image")])


def test_pixels_need_no_cache(folder, filled):
    with pytest.raises(ValueError, match="pixels need none"):
        Loader(CONFIG, TOKENIZER, FolderSource(folder, "all"), cache=filled)


def test_memory_is_bounded_by_a_shard(folder, vae, tmp_path, monkeypatch):
    sizes = []
    cache = LatentCache(tmp_path / "bounded", vae.fingerprint)
    write = cache.write
    monkeypatch.setattr(cache, "write", lambda entries: (sizes.append(len(entries)), write(entries)))
    encode_images(_samples(folder), [(16, 16)], vae, cache, shard_entries=4)
    assert sizes == [4, 4, 2] and latent_cache.LatentCache(tmp_path / "bounded", vae.fingerprint)


def test_a_run_goes_on_with_the_autoencoder_that_it_had(vae, folder, tmp_path):
    """Another one may have been saved in its place: the latents of its images would be others."""
    fields = {key: getattr(CONFIG, key) for key in ("rows", "row_length", "image_size", "text_fraction")}
    config = LoaderConfig(**fields, patch_size=4)

    def loader(autoencoder):
        return Loader(config, TOKENIZER, FolderSource(folder, "all"), autoencoder=autoencoder)

    state = json.loads(json.dumps(loader(vae).state_dict()))
    loader(vae).load_state_dict(state)
    other = save_vae(tmp_path / "other", 2)
    with pytest.raises(ValueError, match="autoencoder is another than at the checkpoint"):
        loader(other).load_state_dict(state)
    with pytest.raises(ValueError, match="sha256 of its encoder none, then"):
        loader(None).load_state_dict(state)
    del state["encoder"]  # as older checkpoints have it
    loader(other).load_state_dict(state)
