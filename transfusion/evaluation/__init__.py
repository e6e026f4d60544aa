"""What a trained model is worth: held-out losses, the conditioning gap, and pictures to look at."""

from transfusion.evaluation.metrics import evaluate

__all__ = ["evaluate"]
