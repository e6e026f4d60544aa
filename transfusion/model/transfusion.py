"""L = L_LM + λ·L_DDPM: one transformer over text tokens and noised image patches (arXiv 2408.11039).

text   token_ids -> embedding ┐                 ┌ hidden[text_rows]  -> head  -> cross-entropy
                              ├-> transformer ->┤
image  patchify_noise -> codec┘      (mask)     └ hidden[image_rows] -> codec -> diffusion_loss
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional

from transfusion.config import ModelConfig
from transfusion.kernels import RaggedLatents, diffusion_loss, patchify_noise
from transfusion.kernels.interval_mask import is_traced
from transfusion.model import initialization, llama, pretrained
from transfusion.model.image_codec import LinearCodec
from transfusion.model.linear import Linear, is_no_more_than_its_weight
from transfusion.model.losses import linear_cross_entropy
from transfusion.model.positions import on_grid
from transfusion.model.transformer import Cache, Transformer
from transfusion.model.unet_codec import Skips, UNetCodec
from transfusion.sequence import Batch, SpecialTokens, image_tokens


class Losses(NamedTuple):
    """Scalars in float32: total = text + λ·image, text in nats per token, image the mean squared error; and the
    error of each image, (I,)."""

    total: Tensor
    text: Tensor
    image: Tensor
    per_image: Tensor


class Transfusion(nn.Module):
    """One transformer with next-token loss on text and diffusion loss on images.

    It can be built on the meta device, and under torch's `FakeTensorMode`, where a step's memory is known without
    computing it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.codec: LinearCodec | UNetCodec = LinearCodec(config) if config.codec == "linear" else UNetCodec(config)
        self.transformer = Transformer(config)
        self.head = Linear(config.dim, config.vocab_size)
        if not self.head.weight.is_meta:
            self.initialize()

    def initialize(self, seed: int | None = None) -> None:
        """Gives every weight its initial value, a function of `seed`, its name and its shape alone.

        Call it after `to_empty(device=...)` on a model built on the meta device. With None the seed is drawn from
        torch's default generator.
        """
        if seed is None:
            with unset_fake_temporarily():  # of stand-ins too, which have no numbers
                seed = int(torch.randint(2**62, (), device="cpu"))
        initialization.initialize(self, self.config, seed)

    def forward(self, batch: Batch, impl: str = "auto") -> Losses:
        """The losses of a batch: a pure function of it and of the weights, for its times and noise are in it.

        `impl` chooses the implementation of every kernel: "auto", "triton" or "reference". Raises `TypeError` for what
        is no batch, `ValueError` for images, and on a CPU for token ids, that do not fit the model. A head with hooks
        or an adapter is called, for the logits of all text at once.
        """
        if not torch.compiler.is_compiling():
            self._check(batch)
        schedule, window = self.config.schedule, self.config.codec_window
        timestep = schedule.timestep(batch.times)
        path = schedule.coefficients(timestep)
        dtype, seed = self.head.weight.dtype, batch.noise_seed
        noised = patchify_noise(batch.latents, path.alpha, path.sigma, window, seed=seed, dtype=dtype, impl=impl)
        hidden, skips = self._run(batch, noised, timestep, impl)
        hidden = hidden.flatten(0, 1)
        text = image = torch.zeros((), device=hidden.device)
        per_image = torch.zeros(0, device=hidden.device)
        if batch.text_rows.numel():
            text = self._text_loss(hidden.index_select(0, batch.text_rows), batch.text_targets)
        if batch.num_images:
            of_images = hidden.index_select(0, batch.image_rows)
            if not isinstance(batch.latents, RaggedLatents):
                of_images = of_images.unflatten(0, (batch.num_images, -1))
            prediction = self.decode_images(of_images, skips)
            per_image = diffusion_loss(
                prediction, batch.latents, path.data_weight, path.noise_weight, window, seed=seed, impl=impl
            )
            image = per_image.mean()
        return Losses(text + self.config.image_loss_weight * image, text, image, per_image)

    def _text_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """In nats a token; where the head is more than its weight, through it and all its logits at once."""
        if is_no_more_than_its_weight(self.head):
            return linear_cross_entropy(hidden, self.head.weight, targets)
        logits = self.head(hidden)
        return functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def _check(self, batch: Batch) -> None:
        """Raises if what the host knows of the batch does not fit the model."""
        if not isinstance(batch, Batch):
            raise TypeError(
                f"a model reads a Batch, got {type(batch).__name__}; `transfusion.sequence.collate` makes one"
            )
        latents, config, ids = batch.latents, self.config, batch.token_ids
        # on a GPU this would wait for the device, which stops at such a token by its own assertion
        if type(ids) is Tensor and ids.device.type == "cpu" and ids.numel() and not is_traced():
            least, most = ids.aminmax()
            if least < 0 or most >= config.vocab_size:
                raise ValueError(
                    f"token ids {least.item()} to {most.item()} do not fit the model's vocab_size={config.vocab_size}"
                )
        if not batch.num_images:
            return
        if isinstance(latents, RaggedLatents):
            channels, shape = latents.channels, "of several sizes"
            tokens = sum(image_tokens(size, config.patch_size) for size in latents.sizes)
        else:
            channels, shape = latents.shape[1], str(tuple(latents.shape))
            tokens = batch.num_images * image_tokens(latents.shape, config.patch_size)
        if channels != config.latent_channels:
            raise ValueError(
                f"images of {channels} channels do not fit the model: it has latent_channels={config.latent_channels}"
            )
        found = batch.image_rows.numel()
        if found != tokens:
            raise ValueError(
                f"the batch has {found} image tokens, and latents {shape} are {tokens} in the model's "
                f"patches of {config.patch_size}; collate with patch_size={config.patch_size}"
            )

    def hidden(
        self, batch: Batch, patches: Tensor, timestep: Tensor, impl: str = "auto", cache: Cache | None = None
    ) -> Tensor:
        """Images as `encode_images` takes them, in place among the batch's text -> hidden (B, N, dim).

        An empty cache, if given, stores the batch's keys and values.
        """
        return self._run(batch, patches, timestep, impl, cache)[0]

    def _run(
        self, batch: Batch, patches: Tensor, timestep: Tensor, impl: str, cache: Cache | None = None
    ) -> tuple[Tensor, Skips | None]:
        x, positions, skips = self.embedding(batch.token_ids), batch.positions, None
        if batch.num_images:
            sides = None if isinstance(batch.latents, RaggedLatents) else batch.latents.shape[-2:]
            tokens, skips = self.encode_images(patches, timestep, sides, batch.token_image if sides is None else None)
            x = x.flatten(0, 1).index_copy(0, batch.image_rows, tokens.flatten(0, -2)).view_as(x)
            if self.config.image_positions == "grid":
                positions = on_grid(batch, self.config.patch_size)
        return self.transformer(x, positions, batch.mask, impl, cache), skips

    def encode_images(
        self, patches: Tensor, timestep: Tensor, sides: Sequence[int] | None, token_image: Tensor | None = None
    ) -> tuple[Tensor, Skips | None]:
        """Images noised to their timestep (I,), cut into `config.codec_window` -> tokens, and what decoding needs.

        patches (I, n, P·P·C) of the linear codec, (I, h·w, C) of the U-Net; sides (h, w) of the latents -> (I, n, dim).
        Of ragged latents, patches (T, P·P·C), token_image (T,) and no sides -> (T, dim). Raises `ValueError` where the
        U-Net is given images that differ in size.
        """
        thousandths = timestep * (1000 / self.config.schedule.timestep_range)
        stream = self.embedding.weight.dtype  # of the residual stream, under autocast too
        if isinstance(self.codec, LinearCodec):
            return self.codec.encode(patches, thousandths, token_image).to(stream), None
        if sides is None:
            raise ValueError(
                "the U-Net codec takes images of one size in a batch, and these differ; put images of one size "
                "together, or use codec='linear'"
            )
        height, width = sides
        tokens, skips = self.codec.encode(patches, thousandths, (height, width))
        return tokens.to(stream), skips

    def decode_images(self, hidden: Tensor, skips: Skips | None) -> Tensor:
        """The images' hidden (I, n, dim) or (T, dim), and what `encode_images` gave -> the prediction, cut as patches
        are."""
        if isinstance(self.codec, LinearCodec):
            return self.codec.decode(hidden)
        assert skips is not None, "the U-Net's way up needs its way down"
        return self.codec.decode(hidden, skips)

    def freeze_text(self) -> "Transfusion":
        """Freezes embedding, transformer and head (imported ones, say): only the codec is trained.

        -> the model itself.
        """
        self.requires_grad_(False)
        self.codec.requires_grad_(True)
        return self

    def save_pretrained(self, path: str | Path, max_shard_size: int = pretrained.SHARD) -> None:
        """Writes the folder `path`: config.toml, and model.safetensors, or its shards of at most so many bytes each
        and their index."""
        pretrained.save(self, path, max_shard_size)

    @staticmethod
    def from_pretrained(
        path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "Transfusion":
        """The model in the folder `path`, the packaged model of that name, or OWNER/NAME on the hub.

        dtype: of the weights; None keeps the file's, except that float16 becomes float32 on a CPU. Raises
        `FileNotFoundError` or `ValueError` naming the file at fault.
        """
        return pretrained.load(path, device, dtype)

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Writes the model's folder to OWNER/NAME on the Hugging Face hub -> its address. Needs huggingface_hub."""
        return pretrained.push(self, repo_id, private, token)

    @staticmethod
    def from_llama(source: Any, special: SpecialTokens | None = None, seed: int = 0, **changes: Any) -> "Transfusion":
        """A model whose text path is a Hugging Face Llama: the same logits for text.

        Args:
            source: a `LlamaForCausalLM`, a folder with config.json and safetensors, or OWNER/NAME on the hub.
            special: ids of the special tokens, those past the end of its vocabulary new. None keeps its BOS and EOS
                and adds PAD, BOI and EOI. A new token starts as the mean of all others.
            seed: of the codec's first weights.
            changes: of the image fields of `ModelConfig`.

        Raises:
            ValueError: an architecture that is not Llama's, weights that do not fit it, or a field it determines.
            FileNotFoundError: a folder without one of the files.
        """
        return llama.load(source, special, seed, changes)

    def num_parameters(self) -> int:
        """Numbers in the weights, frozen or not, on the meta device too."""
        return sum(parameter.numel() for parameter in self.parameters())
