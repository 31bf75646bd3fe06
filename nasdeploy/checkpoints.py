"""The state of an unfinished loop in one file: nested plain data and tensors, as safetensors, without a pickle.

Tensors lie in the file as such; the rest is JSON in its header, where ``{"$tensor": "name"}`` stands for one. Floats
come back bit by bit: JSON holds them by their shortest decimal form that is exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from nasdeploy.errors import RunFolderError
from nasdeploy.files import write_whole

MARK = "$tensor"
HEADER_KEY = "nasdeploy"


def save_checkpoint(path: Path, state: Mapping[str, Any], *, schema: str) -> None:
    """Write ``state`` (dicts, lists, tensors, numbers, text, None) whole or not at all."""
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, "", tensors)
    header = json.dumps({"schema": schema, "state": plain})
    write_whole(path, save(tensors, metadata={HEADER_KEY: header}))


def load_checkpoint(path: Path, *, schema: str) -> dict[str, Any]:
    """Return what was saved. Raises RunFolderError when the file is damaged or of another schema."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        found, state = header["schema"], _with_tensors(header["state"], tensors)
    except Exception as error:  # safetensors raises types of its own, by version
        raise RunFolderError(f"{path}: cannot be read ({error}); delete it and build again") from error
    if found != schema or not isinstance(state, dict):
        raise RunFolderError(f"{path}: schema {found!r}; expected '{schema}'; delete it and build again")
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over ``optimizer.state_dict()`` from a checkpoint, whose keys became text.

    Buffers take the memory format of their parameters: torch keeps that of the file, and steps become slower.
    """
    buffers = {int(index): values for index, values in state["state"].items()}
    optimizer.load_state_dict({"state": buffers, "param_groups": state["param_groups"]})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {MARK: name}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {MARK}:
            return tensors[value[MARK]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value
