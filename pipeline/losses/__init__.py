"""Losses, a file each. What a user's own loss is made of can be imported from here."""

from pipeline.losses._base import BatchLoss, Facts, Loss, Taps, Wrapping

__all__ = ["BatchLoss", "Facts", "Loss", "Taps", "Wrapping"]
