"""From a document so far to what comes next: text, images, or both in turn."""

from transfusion.generation.image import denoise
from transfusion.generation.interleaved import generate
from transfusion.generation.pipeline import TransfusionPipeline
from transfusion.generation.text import generate_text

__all__ = ["TransfusionPipeline", "denoise", "generate", "generate_text"]
