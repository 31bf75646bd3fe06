"""Tensors as plain data: the shape, the type and the numbers, little-endian, as base64."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

STORED = {"float32": "<f4", "float64": "<f8", "int64": "<i8"}


def to_plain(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return ``tensors`` as lists, numbers and text."""
    plain = {}
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().numpy()
        content = base64.b64encode(values.astype(STORED[values.dtype.name]).tobytes()).decode("ascii")
        plain[name] = {"shape": list(values.shape), "type": values.dtype.name, "values": content}
    return plain


def from_plain(plain: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that :func:`to_plain` wrote, bit by bit, on the CPU."""
    tensors = {}
    for name, row in plain.items():
        values = np.frombuffer(base64.b64decode(row["values"]), dtype=STORED[row["type"]])
        tensors[name] = torch.from_numpy(values.astype(row["type"]).reshape(row["shape"]))
    return tensors
