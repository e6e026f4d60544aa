"""The network: transformer, image codec, and the two losses on top of them."""

from transfusion.model.transfusion import Losses, Transfusion

__all__ = ["Losses", "Transfusion"]
