"""From documents so far to what comes next: text, images, or both in turn."""

from transfusion.generation.guidance import Guidance
from transfusion.generation.interleaved import denoise, generate
from transfusion.generation.pipeline import TransfusionPipeline
from transfusion.generation.requests import Generation, Request
from transfusion.generation.score import score
from transfusion.generation.text import TextSampling

__all__ = ["Generation", "Guidance", "Request", "TextSampling", "TransfusionPipeline", "denoise", "generate", "score"]
