"""How far generated images are from real ones, in the features of a given network.

    Fréchet   ‖μ - μ'‖² + tr(Σ + Σ' - 2·√(Σ·Σ'))       of the two sets' means and covariances
    KID       unbiased MMD² under (f·f' / F + 1)³       mean over subsets: no bias from few images

They are called FID and KID only where the features are those of the Inception network that the literature uses; other
features give other numbers. Both are torchmetrics'.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BATCH = 32
Images = Tensor | Sequence[Tensor]
"""(I, 3, h, w), or a list of images (3, h_i, w_i)."""


class _Features(nn.Module):
    """What torchmetrics wants of a network: it tells how many features it gives."""

    def __init__(self, network: Callable[[Tensor], Tensor], num_features: int) -> None:
        super().__init__()
        self.network, self.num_features = network, num_features

    def forward(self, images: Tensor) -> Tensor:
        """(I, 3, h, w) -> (I, F) float64."""
        features = self.network(images).double()
        if features.shape[-1] != self.num_features:
            raise ValueError(
                f"the network makes {features.shape[-1]} features of images {tuple(images.shape[1:])} and "
                f"{self.num_features} of others; it must make as many of any size, by resizing them for instance"
            )
        return features


def load_features(name: str | Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """A network from images (I, 3, h, w) in [0, 1] to features (I, F): "inception", or a TorchScript file.

    Raises `ImportError` where what the distances or "inception" need is not installed, before anything is drawn;
    `FileNotFoundError` or `ValueError` naming the file.
    """
    _distances()
    if str(name) == "inception":
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            inception = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
        except ModuleNotFoundError as error:
            raise ImportError(f"features='inception' needs torchmetrics and torch-fidelity: {error}") from error
        return lambda images: inception((images * 255).round().byte())
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give 'inception' or a TorchScript file that gives features")
    try:
        network: Callable[[Tensor], Tensor] = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is no TorchScript file: {error}") from error
    return network


@torch.inference_mode()
def image_distances(
    real: Images, generated: Images, features: Callable[[Tensor], Tensor], subset_size: int = 100, seed: int = 0
) -> dict[str, float]:
    """Distances between two sets of images (3, h_i, w_i) in [-1, 1], under `features` of images in [0, 1].

    Where they differ in size, `features` is given those of one size together, and nothing here resizes them: it must
    make as many features of any size, as "inception" does, which resizes them itself.

    subset_size: of KID's 100 random subsets, `seed` draws them; at most the smaller set. The Fréchet distance needs
    more images than features to mean much, so `features` and both sizes are told beside it. Raises `ValueError` for
    fewer than two images, or features whose number depends on the size.
    """
    frechet_distance, kernel_distance = _distances()
    smaller = min(len(real), len(generated))
    if smaller < 2:
        raise ValueError(f"a distance needs two images or more on each side, got {len(real)} and {len(generated)}")
    width = features(_unit(real[0][None])).shape[-1]
    network = _Features(features, width)
    frechet = frechet_distance(feature=network).to(real[0].device)
    kid = kernel_distance(feature=network, subset_size=min(subset_size, smaller)).to(real[0].device)
    for images, is_real in ((real, True), (generated, False)):
        for part in _batches(images):
            frechet.update(_unit(part), real=is_real)
            kid.update(_unit(part), real=is_real)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws the subsets from the global generator
        torch.manual_seed(seed)
        mean, spread = kid.compute()
    return {
        "frechet_distance": float(frechet.compute()),
        "kernel_distance": float(mean),
        "kernel_distance_standard_deviation": float(spread),
        "features": width,
        "real_images": len(real),
        "generated_images": len(generated),
    }


def _distances() -> tuple[Any, Any]:
    """torchmetrics' Fréchet and kernel distance, or an `ImportError` that says what to install."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise ImportError("distances between sets of images need torchmetrics: pip install torchmetrics") from error
    return FrechetInceptionDistance, KernelInceptionDistance


def _batches(images: Images) -> Iterator[Tensor]:
    """(B, 3, h, w): those of one size together, in their order."""
    for size in dict.fromkeys(image.shape for image in images):
        yield from torch.stack([image for image in images if image.shape == size]).split(_BATCH)


def _unit(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return (images.clamp(-1, 1) + 1) / 2
