"""Devices and mixed precision, in one place."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from nasdeploy.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the training device: ``auto``, ``cpu`` or ``cuda``. Raises ConfigError where there is none such."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: no CUDA device is visible to torch; expected one, or use --device cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return mixed precision for ``device``: bfloat16 on GPUs that have it (no loss scaling needed), none elsewhere."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
