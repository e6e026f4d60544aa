"""How good a trained model is: held-out losses, the conditioning gap, distances between sets of images, pictures."""

from transfusion.evaluation.distances import image_distances, load_features
from transfusion.evaluation.metrics import evenly, image_figures, pictures, read_images, text_figures

__all__ = ["evenly", "image_distances", "image_figures", "load_features", "pictures", "read_images", "text_figures"]
