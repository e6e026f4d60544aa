"""Training: the loop, its optimizer, its checkpoints, its log."""

from transfusion.training.optimizer import TrainConfig
from transfusion.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer"]
