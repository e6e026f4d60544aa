"""Training: the loop, its optimizer, its checkpoints, its log, and how a step is spread over devices."""

from transfusion.training.optimizer import TrainConfig
from transfusion.training.parallel import ParallelConfig, distribute, materialize
from transfusion.training.trainer import Trainer
from transfusion.training.world import World, join

__all__ = ["ParallelConfig", "TrainConfig", "Trainer", "World", "distribute", "join", "materialize"]
