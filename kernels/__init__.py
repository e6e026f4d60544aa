"""Triton kernels of Transfusion, each beside its reference. Import this folder as `transfusion.kernels`."""

if __name__ == "kernels":  # the repository root is on sys.path: shadowing Hugging Face's package would break others
    raise ImportError("this folder is imported as `transfusion.kernels`; `kernels` is another package's name")

from transfusion.kernels import own_name
from transfusion.kernels.attention.op import prepare_attention, transfusion_attention
from transfusion.kernels.denoise_step.op import denoise_step
from transfusion.kernels.diffusion_loss.op import diffusion_loss
from transfusion.kernels.interval_mask import IntervalMask
from transfusion.kernels.patchify_noise.op import patchify_noise
from transfusion.kernels.ragged_latents import RaggedLatents

__all__ = [
    "IntervalMask",
    "RaggedLatents",
    "denoise_step",
    "diffusion_loss",
    "patchify_noise",
    "prepare_attention",
    "transfusion_attention",
]

own_name.keep()  # for transformers and diffusers, which whoever imported this may import next
