"""Losses, a file each. What a user's own loss is made of can be imported from here."""

from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._rows import BatchLoss
from pipeline.losses._transform import LogitTransform

__all__ = ["BatchLoss", "Facts", "LogitTransform", "Loss", "Taps"]
