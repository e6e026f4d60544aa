"""Transfusion (arXiv 2408.11039): one transformer, next-token loss on text and diffusion loss on images."""

from transfusion import presets
from transfusion.config import ModelConfig
from transfusion.model import Losses, Transfusion

__version__ = "0.1.0"
__all__ = ["Losses", "ModelConfig", "Transfusion", "presets"]
