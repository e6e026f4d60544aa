"""Frozen dataclasses, and their way to TOML and back.

    load(TrainConfig, path) == config   after   save(config, path)

An unknown or mistyped key raises `ValueError` with its full name, so a misspelt option never passes for a default.
"""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.files import write_whole
from transfusion.sequence import SpecialTokens

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's slowing of the low rotary frequencies, for contexts longer than the weights were first trained on.

    A frequency is characterised by its number of turns within the original training context. Names are those of Llama's
    config.

    Args:
        factor: divides the frequencies that turn at most `low_freq_factor` times.
        low_freq_factor: turns, see above; between this and `high_freq_factor`, a linear blend.
        high_freq_factor: turns; frequencies with at least so many stay as they are.
        original_max_position_embeddings: context of the original training, in tokens.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        low, high, context = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        if not 0 < low < high:
            raise ValueError(f"0 < low_freq_factor < high_freq_factor, got {low} and {high}")
        if self.factor <= 0 or context < 1:
            raise ValueError(f"factor {self.factor} and original_max_position_embeddings {context} must be positive")


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net codec: down blocks before the transformer, up blocks after it (arXiv 2408.11039, section 3.2).

    Level l works at 1/2^l of the latent's sides, l = 0 .. log2(patch_size). The paper gives neither widths nor depth.

    Args:
        width: channels of level 0.
        deep_width: channels of every level below it.
        blocks: residual blocks of a level on the way down; the way up has one more (Nichol & Dhariwal).
        attention: whether the levels below 0 attend, after each residual block.
        head_dim: of that attention; it divides deep_width.
        skips: whether the way up reads what the way down has seen, level by level.
    """

    width: int = 512
    deep_width: int = 1024
    blocks: int = 2
    attention: bool = True
    head_dim: int = 64
    skips: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "deep_width", "blocks", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.attention and self.deep_width % self.head_dim:
            raise ValueError(f"deep_width {self.deep_width} does not split into heads of {self.head_dim}")


@dataclass(frozen=True)
class ModelConfig:
    """Llama's shape and an image codec, by default the linear one (arXiv 2408.11039, section 3.2 and table 2).

    Args:
        vocab_size: text tokens, special ones included.
        dim: width.
        layers: depth.
        heads: query heads.
        kv_heads: key heads; None is as many as query heads.
        ffn_width: of SwiGLU; None is 2/3·4·dim rounded up to a multiple of 256.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama 3.1's, for imported weights that were trained with it.
        norm_eps: of RMSNorm.
        qk_norm: RMSNorm over each head's query and key before they are rotated. Not in the paper.
        image_positions: "sequence" rotates an image token by its place in the document, as in the paper; "grid" by its
            row and column (`transfusion.model.positions.grid_positions`).
        latent_channels: C of an image latent.
        patch_size: P; a P×P window of latents is one token.
        codec: between latents and tokens, "linear" or "unet".
        unet: sizes of the U-Net codec.
        image_loss_weight: λ of L_LM + λ·L_DDPM.
        schedule: what the network predicts about an image, and the noise path.
        special: ids of the special tokens.
    """

    vocab_size: int = 32000
    dim: int = 768
    layers: int = 16
    heads: int = 12
    kv_heads: int | None = None
    ffn_width: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = False
    image_positions: Literal["sequence", "grid"] = "sequence"
    latent_channels: int = 8
    patch_size: int = 2
    codec: Literal["linear", "unet"] = "linear"
    unet: UNetConfig = field(default_factory=UNetConfig)
    image_loss_weight: float = 5.0
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    special: SpecialTokens = field(default_factory=SpecialTokens)

    def __post_init__(self) -> None:
        check_types(self)
        check_finite(self, positive=("rope_theta", "image_loss_weight"), not_negative=("norm_eps",))
        for name in ("vocab_size", "dim", "layers", "heads", "latent_channels", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} does not split into {self.heads} heads of an even size")
        if self.num_kv_heads < 1 or self.heads % self.num_kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.ffn_dim < 1:
            raise ValueError(f"ffn_width must be at least 1, got {self.ffn_width}")
        if self.image_positions == "grid" and self.head_dim % 4:
            raise ValueError(f"image_positions='grid' needs a head size that is a multiple of 4, got {self.head_dim}")
        if self.codec == "unet" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(
                f"the U-Net codec halves the sides: patch_size must be 2, 4, 8, ..., got {self.patch_size}"
            )
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
        """ffn_width, or 2/3·4·dim rounded up to a multiple of 256."""
        return -(-(8 * self.dim // 3) // 256) * 256 if self.ffn_width is None else self.ffn_width

    @property
    def patch_dim(self) -> int:
        """P·P·C: numbers in one image token."""
        return self.patch_size**2 * self.latent_channels

    @property
    def codec_window(self) -> int:
        """Side of the windows that the codec reads and predicts: P of the linear codec, 1, a pixel, of the U-Net."""
        return 1 if self.codec == "unet" else self.patch_size


def check_types(config: Any) -> None:
    """Raises `ValueError` naming the first field of a dataclass whose value has the wrong type."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not any(_is_of(option, value) for option in _options(hint)):
            raise ValueError(f"{name} must be {_described(hint)}, got {value!r}")


def check_finite(config: Any, positive: Sequence[str] = (), not_negative: Sequence[str] = ()) -> None:
    """Raises `ValueError` naming the first of these fields that is not finite, or of the wrong sign."""
    for name in positive:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")
    for name in not_negative:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {getattr(config, name)}")


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


def from_dict(cls: type[T], data: dict[str, Any], where: str = "", default: T | None = None) -> T:
    """The dataclass `cls` from a nested dict; fields that it does not name are taken from `default`, or are the class's
    own defaults.

    A table starts from what its field holds by default. Raises `ValueError` that names the key at fault.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in fields:
            raise ValueError(f"unknown key {where + key!r}; known here: {', '.join(fields)}")
        values[key] = _convert(hints[key], value, where + key, _default(fields[key], default))
    try:
        return cls(**values) if default is None else dataclasses.replace(default, **values)  # type: ignore[type-var]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where.rstrip('.') or cls.__name__}: {error}") from error


def _default(field: "dataclasses.Field[Any]", owner: Any) -> Any:
    """What `field` holds in `owner`, or by default where there is no owner; None if it has no default."""
    if owner is not None:
        return getattr(owner, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return str(getattr(hint, "__name__", hint))


def _is_of(option: Any, value: Any) -> bool:
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option)
    kinds = (int, float) if option is float else option
    return isinstance(value, kinds) and (option is bool or not isinstance(value, bool))


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    for option in _options(hint):
        if dataclasses.is_dataclass(option):
            if not isinstance(value, dict):
                raise ValueError(f"{where} must be a table, got {value!r}")
            start = default if dataclasses.is_dataclass(default) else None
            return from_dict(option, value, where + ".", start)  # type: ignore[arg-type]
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if typing.get_origin(option) is tuple:
            if isinstance(value, list):
                return _tuple(typing.get_args(option), value, where)
        elif _is_of(option, value):
            return value
    raise ValueError(f"{where} must be {_described(hint)}, got {value!r}")


def _tuple(hints: tuple[Any, ...], values: list[Any], where: str) -> tuple[Any, ...]:
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(values)
    if len(hints) != len(values):
        raise ValueError(f"{where} must hold {len(hints)} values, got {values!r}")
    pairs = enumerate(zip(hints, values, strict=True))
    return tuple(_convert(hint, value, f"{where}[{place}]") for place, (hint, value) in pairs)


def save(config: Any, path: Path) -> None:
    """Writes `config` as TOML."""
    import tomli_w

    try:
        content = tomli_w.dumps(to_dict(config)).encode()
    except UnicodeEncodeError as error:
        name = error.object[max(error.start - 40, 0) : error.end + 20]
        raise ValueError(f"{path.name} cannot hold a name that is no Unicode: ...{name!r}...; rename it") from error
    write_whole(path, content)


def read(path: Path) -> dict[str, Any]:
    """A TOML file's tables."""
    return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark


def load(cls: type[T], path: Path) -> T:
    """Reads TOML into the dataclass `cls`. Raises `ValueError` that names the file and the key at fault."""
    try:
        return from_dict(cls, read(path))
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
