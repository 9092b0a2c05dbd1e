"""Losses, one file each. The base classes of a user's own loss can be imported from here."""

from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._rows import BatchLoss
from pipeline.losses._transform import LogitTransform

__all__ = ["BatchLoss", "Facts", "LogitTransform", "Loss", "Taps"]
