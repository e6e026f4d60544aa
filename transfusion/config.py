"""Frozen dataclasses, and their way to TOML and back.

    load(TrainConfig, path) == config   after   save(config, path)

An unknown or mistyped key raises `ValueError` with its full name, so a misspelt option never passes for a default.
"""

import dataclasses
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.sequence import SpecialTokens

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """Llama's shape and a linear image codec (arXiv 2408.11039, section 3.2 and table 2).

    Args:
        vocab_size: text tokens, special ones included.
        dim: width.
        layers: depth.
        heads: query heads.
        kv_heads: key heads; None is as many as query heads.
        rope_theta: base of the rotary frequencies.
        norm_eps: of RMSNorm.
        latent_channels: C of an image latent.
        patch_size: P; a P×P window of latents is one token.
        image_loss_weight: λ of L_LM + λ·L_DDPM.
        schedule: what the network predicts about an image, and the noise path.
        special: ids of the special tokens.
    """

    vocab_size: int = 32000
    dim: int = 768
    layers: int = 16
    heads: int = 12
    kv_heads: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    latent_channels: int = 8
    patch_size: int = 2
    image_loss_weight: float = 5.0
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    special: SpecialTokens = field(default_factory=SpecialTokens)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "latent_channels", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} does not split into {self.heads} heads of an even size")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        largest = max(dataclasses.astuple(self.special))
        if largest >= self.vocab_size:
            raise ValueError(f"special token {largest} is outside the vocabulary of {self.vocab_size}")

    @property
    def num_kv_heads(self) -> int:
        """Key heads; `heads` unless kv_heads says otherwise."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_dim(self) -> int:
        """dim / heads."""
        return self.dim // self.heads

    @property
    def ffn_dim(self) -> int:
        """2/3·4·dim rounded up to a multiple of 256."""
        return -(-(8 * self.dim // 3) // 256) * 256

    @property
    def patch_dim(self) -> int:
        """P·P·C: numbers in one image token."""
        return self.patch_size**2 * self.latent_channels


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of a dataclass; None, which TOML cannot say, is left out."""
    result: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            result[f.name] = to_dict(value)
        elif value is not None:
            result[f.name] = list(value) if isinstance(value, tuple) else value
    return result


def from_dict(cls: type[T], data: dict[str, Any], where: str = "") -> T:
    """The dataclass `cls` from a nested dict. Raises `ValueError` that names the key at fault."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in names:
            raise ValueError(f"unknown key {where + key!r}; known here: {', '.join(names)}")
        values[key] = _convert(hints[key], value, where + key)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where.rstrip('.') or cls.__name__}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a table, got {value!r}")
        return from_dict(hint, value, where + ".")  # type: ignore[arg-type]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        origin = typing.get_origin(option)
        if origin is tuple and isinstance(value, list):
            return tuple(value)
        if origin is typing.Literal and value in typing.get_args(option):
            return value
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    raise ValueError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def save(config: Any, path: Path) -> None:
    """Writes `config` as TOML."""
    import tomli_w

    path.write_bytes(tomli_w.dumps(to_dict(config)).encode())


def load(cls: type[T], path: Path) -> T:
    """Reads TOML into the dataclass `cls`. Raises `ValueError` that names the file and the key at fault."""
    try:
        return from_dict(cls, tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
