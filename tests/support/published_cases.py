"""What an adapter of published values answers; the adapters stand in published_<family>.py, one function a formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Case = dict[str, Any]
"""The arrays of a file as float64 tensors by key, and ``hyper``."""
Outcome = tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]
"""Outputs by name; the scalar that is differentiated; what it is differentiated by, under the names of ``grad.*``."""
Formulas = dict[str, Callable[[Case], Outcome]]
