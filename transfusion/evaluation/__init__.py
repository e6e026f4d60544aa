"""What a trained model is worth: held-out losses, the conditioning gap, and pictures to look at."""

from transfusion.evaluation.metrics import image_figures, read_images, text_figures

__all__ = ["image_figures", "read_images", "text_figures"]
