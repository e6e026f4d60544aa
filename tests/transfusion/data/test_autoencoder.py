import pytest
import torch

from transfusion.data.autoencoder import Autoencoder, DiffusersAutoencoder, PixelAutoencoder


def test_pixels_are_their_own_latents():
    images = torch.rand(2, 3, 5, 7, dtype=torch.float64) * 2 - 1
    autoencoder: Autoencoder = PixelAutoencoder()
    latents = autoencoder.encode(images)
    assert latents.dtype == torch.float32 and torch.equal(latents, images.float())
    assert torch.equal(autoencoder.decode(latents), images.float())
    assert autoencoder.decode(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1)).flatten().tolist() == [-1, 1]
    assert (autoencoder.latent_channels, autoencoder.downscale) == (3, 1)


@pytest.fixture(scope="module", params=[(0.5, None), (0.36, 0.12)], ids=["scale", "scale-shift"])
def saved(request, tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    scale, shift = request.param
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=scale,
        shift_factor=shift,
    )
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return vae.eval(), path, scale, shift or 0.0


def test_diffusers_latents_are_scaled_and_shifted(saved):
    vae, path, scale, shift = saved
    autoencoder: Autoencoder = DiffusersAutoencoder(path)
    assert (autoencoder.latent_channels, autoencoder.downscale) == (4, 2)
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    latents = autoencoder.encode(images)
    assert latents.shape == (2, 4, 4, 6)
    assert torch.equal(latents, (posterior.mode() - shift) * scale)
    with torch.no_grad():
        expected = vae.decode(latents / scale + shift).sample.clamp(-1, 1)
    assert torch.equal(autoencoder.decode(latents), expected)
    assert not autoencoder.decode(latents).requires_grad


def test_diffusers_samples_from_the_generator_only(saved):
    autoencoder = DiffusersAutoencoder(saved[1])
    images = torch.rand(1, 3, 8, 8)
    first, again, other = (autoencoder.encode(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(autoencoder.encode(images), autoencoder.encode(images))


def test_moments_are_kept_apart_from_scale_and_sampling(saved):
    autoencoder = DiffusersAutoencoder(saved[1])
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    moments = autoencoder.moments(images)
    assert moments.shape == (2, 8, 4, 4)
    for seed in (None, 5):
        draws = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
        assert torch.equal(autoencoder.latents(moments, draws[0]), autoencoder.encode(images, draws[1]))
    assert autoencoder.fingerprint == DiffusersAutoencoder(saved[1]).fingerprint
    assert autoencoder.fingerprint != DiffusersAutoencoder(saved[1], dtype=torch.bfloat16).fingerprint


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere' is neither the folder of an AutoencoderKL nor a name"):
        DiffusersAutoencoder(tmp_path / "nowhere")


def test_diffusers_clamps_and_computes_in_its_dtype(saved):
    autoencoder = DiffusersAutoencoder(saved[1], dtype=torch.bfloat16)
    latents = autoencoder.encode(torch.rand(1, 3, 8, 8))
    images = autoencoder.decode(latents * 1000)
    assert latents.dtype == images.dtype == torch.float32
    assert images.abs().max() <= 1


def test_shapes_that_do_not_fit_are_named(saved):
    autoencoder = DiffusersAutoencoder(saved[1])
    with pytest.raises(ValueError, match=r"7x8 .* downscale 2"):
        autoencoder.encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        PixelAutoencoder().encode(torch.zeros(3, 8, 8))
