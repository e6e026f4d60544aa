"""Llama's weights as the text path: q, k, v and gate, up joined, everything else by another name.

    model.layers.0.self_attn.{q,k,v}_proj -> transformer.blocks.0.attention.qkv     (rows of q, then k, then v)
    model.layers.0.mlp.{gate,up}_proj     -> transformer.blocks.0.ffn.gate_up       (rows of gate, then up)

Both rotate the halves of a head, so no row changes its place. The weights become float32, like everything trained here.
transformers is not needed to read a folder.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transfusion.config import ModelConfig, RopeScaling
from transfusion.model import initialization, pretrained
from transfusion.sequence import SpecialTokens

if TYPE_CHECKING:
    from transfusion.model.transfusion import Transfusion

_BLOCK = {
    "attention_norm.weight": ("input_layernorm",),
    "attention.qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out.weight": ("self_attn.o_proj",),
    "ffn_norm.weight": ("post_attention_layernorm",),
    "ffn.gate_up.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down.weight": ("mlp.down_proj",),
}
_REST = {"embedding.weight": "model.embed_tokens.weight", "transformer.norm.weight": "model.norm.weight"}
# the fields that Llama's config leaves open
_FREE = {"codec", "image_loss_weight", "image_positions", "latent_channels", "patch_size", "schedule", "unet"}


def load(source: Any, special: SpecialTokens | None, seed: int, changes: Mapping[str, Any]) -> "Transfusion":
    """See `Transfusion.from_llama`."""
    from transfusion.model.transfusion import Transfusion

    if isinstance(source, str | Path):
        folder = pretrained.local_folder(source)
        described, weights = _read_json(folder / "config.json"), pretrained.read_weights(folder)
    else:
        described, weights = source.config.to_dict(), dict(source.state_dict())
    fixed = sorted(changes.keys() - _FREE)
    if fixed:
        raise ValueError(f"Llama's weights determine {', '.join(fixed)}; free are {', '.join(sorted(_FREE))}")
    config = dataclasses.replace(model_config(described, special), **changes)
    renamed = rename(weights, config, tied=bool(described.get("tie_word_embeddings")))
    with torch.device("meta"):
        model = Transfusion(config)
    for name, parameter in model.codec.named_parameters(prefix="codec"):
        renamed[name] = initialization.initial_value(name, parameter.shape, config, seed)
    try:
        model.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights are not of the Llama that their config describes: {error}") from error
    return model


def model_config(described: Mapping[str, Any], special: SpecialTokens | None = None) -> ModelConfig:
    """The `ModelConfig` of a Llama's config.json. Raises `ValueError` naming a field of another architecture."""
    kind = described.get("model_type")
    if kind != "llama":
        raise ValueError(f"model_type {kind!r} is not 'llama'")
    for key, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if described.get(key, wanted) != wanted:
            raise ValueError(f"{key}={described[key]!r}: only {wanted!r} is supported")
    dim, heads, vocabulary = described["hidden_size"], described["num_attention_heads"], described["vocab_size"]
    if described.get("head_dim") not in (None, dim // heads):
        raise ValueError(f"head_dim {described['head_dim']} is not hidden_size / heads, {dim // heads}")
    special = _special(described, vocabulary) if special is None else special
    theta, scaling = _rope(described)
    return ModelConfig(
        vocab_size=max(vocabulary, 1 + max(dataclasses.astuple(special))),
        dim=dim,
        layers=described["num_hidden_layers"],
        heads=heads,
        kv_heads=described.get("num_key_value_heads"),
        ffn_width=described["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=described.get("rms_norm_eps", 1e-6),
        special=special,
    )


def _special(described: Mapping[str, Any], vocabulary: int) -> SpecialTokens:
    """Llama's own BOS and EOS (the first, if it has several); PAD, BOI and EOI are new."""
    ids = {}
    for name, default in (("bos", 1), ("eos", 2)):
        given = described.get(f"{name}_token_id", default)
        ids[name] = given[0] if isinstance(given, list) else given
        if ids[name] is None:
            raise ValueError(f"{name}_token_id is not set; pass special=SpecialTokens(...)")
    return SpecialTokens(pad=vocabulary, bos=ids["bos"], eos=ids["eos"], boi=vocabulary + 1, eoi=vocabulary + 2)


def _rope(described: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", described.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; 'default' and 'llama3' are")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, RopeScaling(**{key: rope[key] for key in keys})


def rename(weights: Mapping[str, Tensor], config: ModelConfig, tied: bool) -> dict[str, Tensor]:
    """Llama's state dict as that of a `Transfusion` without its codec; rows of new tokens are the mean of the others.

    Raises `ValueError` that names a missing tensor.
    """
    missing = []

    def take(name: str) -> Tensor:
        if name not in weights:
            missing.append(name)
            return torch.empty(0)
        return weights[name].detach().float()

    result = {ours: take(theirs) for ours, theirs in _REST.items()}
    result["head.weight"] = result["embedding.weight"] if tied else take("lm_head.weight")
    for layer in range(config.layers):
        for ours, theirs in _BLOCK.items():
            parts = [take(f"model.layers.{layer}.{name}.weight") for name in theirs]
            result[f"transformer.blocks.{layer}.{ours}"] = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
    if missing:
        raise ValueError(f"the weights lack {', '.join(missing[:3])}{' and more' if missing[3:] else ''}")
    for name in ("embedding.weight", "head.weight"):
        known = result[name]
        if len(known) > config.vocab_size:
            raise ValueError(f"the weights know {len(known)} tokens, their config has only {config.vocab_size}")
        mean = known.mean(0, keepdim=True)
        result[name] = torch.cat([known, mean.expand(config.vocab_size - len(known), -1)])
    result["transformer.norm.weight"] = result["transformer.norm.weight"].clone()
    return result


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a saved Llama: it has no {path.name}")
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is truncated, or no JSON: {error}") from error
    return described
