"""Distances between sets of images: the formulas on features that are known, and what is said where something lacks."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from transfusion.evaluation import image_distances, load_features
from transfusion.kernels.testing import judge

pytest.importorskip("torchmetrics")


def moments(images: torch.Tensor) -> torch.Tensor:
    """(I, 6): mean and standard deviation of each channel."""
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def images(seed: int, count: int = 40, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 3, 8, 8, generator=generator) * 0.2 + shift).clamp(-1, 1)


def features(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return moments((images + 1) / 2).to(dtype)


def frechet(real: torch.Tensor, drawn: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    one, two = features(real, dtype), features(drawn, dtype)
    eigenvalues = torch.linalg.eigvals(one.T.cov() @ two.T.cov())
    means = (one.mean(0) - two.mean(0)).square().sum()
    return means + one.T.cov().trace() + two.T.cov().trace() - 2 * eigenvalues.sqrt().real.sum()


def unbiased_mmd(real: torch.Tensor, drawn: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    one, two = features(real, dtype), features(drawn, dtype)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    count = len(real)
    within = [(k.sum() - k.trace()) / (count * (count - 1)) for k in (kernel(one, one), kernel(two, two))]
    return sum(within) - 2 * kernel(one, two).mean()


@pytest.mark.parametrize(("name", "formula"), [("frechet_distance", frechet), ("kernel_distance", unbiased_mmd)])
def test_a_distance_is_its_formula(name: str, formula: Callable[..., torch.Tensor]) -> None:
    seed = torch.seed() % 2**31
    print("seed", seed)
    real, drawn = images(seed), images(seed + 1, shift=0.3)
    result = image_distances(real, drawn, moments, subset_size=len(real))
    verdict = judge(
        torch.tensor(result[name]), formula(real, drawn, torch.float32), formula(real, drawn, torch.float64)
    )
    assert verdict.passed, verdict
    assert (result["features"], result["real_images"], result["generated_images"]) == (6, 40, 40)


def test_nearer_sets_are_nearer_and_the_seed_decides() -> None:
    real = images(4)
    near, far = (image_distances(real, images(5, shift=shift), moments, subset_size=20) for shift in (0.05, 0.5))
    assert near["frechet_distance"] < far["frechet_distance"]
    assert near["kernel_distance"] < far["kernel_distance"]
    assert near == image_distances(real, images(5, shift=0.05), moments, subset_size=20)
    assert near != image_distances(real, images(5, shift=0.05), moments, subset_size=20, seed=1)


def test_images_of_several_sizes_are_told_apart_by_their_features_alone() -> None:
    """Every third is twice as wide, each pixel repeated, with the same mean; a network that counts pixels is named."""

    def widened(images: torch.Tensor) -> list[torch.Tensor]:
        return [image.repeat_interleave(1 + (index % 3 == 0), dim=2) for index, image in enumerate(images)]

    def means(images: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(images.shape))
        return images.double().mean((2, 3))

    real, drawn, seen = images(0), images(1, shift=0.1), []
    expected = image_distances(real, drawn, means, subset_size=40)
    seen.clear()
    assert image_distances(widened(real), widened(drawn), means, subset_size=40) == pytest.approx(expected)
    assert set(seen[1:]) == {(14, 3, 8, 16), (26, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"makes 192 features of images \(3, 8, 8\) and 384 of others"):
        image_distances(widened(real), real, lambda images: images.flatten(1))


def test_features_come_from_a_file(tmp_path: Path) -> None:
    class Moments(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    torch.jit.trace(Moments(), images(0)).save(tmp_path / "moments.pt")
    network = load_features(tmp_path / "moments.pt")
    assert torch.equal(network(images(1)), images(1).mean((2, 3)))


def test_what_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt does not exist"):
        load_features(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match=r"text\.pt is no TorchScript file"):
        load_features(tmp_path / "text.pt")
    with pytest.raises(ValueError, match="got 40 and 1"):
        image_distances(images(0), images(1)[:1], moments)


def test_a_missing_package_is_told_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    with pytest.raises(ImportError, match="pip install torchmetrics"):
        load_features(tmp_path / "moments.pt")
