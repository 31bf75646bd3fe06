"""The files that ``bench`` measures: read once, named apart, with a shape for every input."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from nasdeploy.errors import ConfigError
from nasdeploy.exporters.files import parse_model, read_bytes
from nasdeploy.exporters.structure import TensorInfo, model_inputs
from nasdeploy.pipeline.input_shapes import Batch, Shape, resolve_shapes

__all__ = ["ModelFile", "distinct_labels", "read_files", "stored_precision"]

PRECISIONS = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp64",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "int8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """A file to measure. shapes: {input: shape} that it is run with.

    precision: in which most of its weights are stored, such as "fp32", "fp16" or "int8"; None without weights.
    """

    label: str
    path: Path
    sha256: str
    file_size: int
    inputs: tuple[TensorInfo, ...]
    shapes: Mapping[str, Shape]
    precision: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        return {
            "label": self.label,
            "path": str(self.path),
            "sha256": self.sha256,
            "file_size": self.file_size,
            "precision": self.precision,
            "inputs": [
                {"name": value.name, "dtype": value.dtype, "shape": list(self.shapes[value.name])}
                for value in self.inputs
            ],
        }


def read_files(paths: Sequence[Path], *, batch: Batch, given: Mapping[str, Sequence[int]]) -> list[ModelFile]:
    """Return the facts of each file. Raises UsageError and ConfigError; given: shapes by the name of an input."""
    files = []
    for label, path in zip(distinct_labels(paths), paths, strict=True):
        content = read_bytes(path)
        model = parse_model(content, path)
        inputs = model_inputs(model)
        files.append(
            ModelFile(
                label=label,
                path=path,
                sha256=hashlib.sha256(content).hexdigest(),
                file_size=len(content),
                inputs=inputs,
                shapes=resolve_shapes(inputs, path=path, batch=batch, given=given),
                precision=stored_precision(model),
            )
        )
    _check_names(files, given)
    return files


def _check_names(files: Sequence[ModelFile], given: Mapping[str, Sequence[int]]) -> None:
    """Raise ConfigError for a shape of an input that no file has."""
    known = list(dict.fromkeys(value.name for file in files for value in file.inputs))
    for name in given:
        if name not in known:
            raise ConfigError(f"--shape {name}: no input has this name; expected one of {', '.join(known)}")


def distinct_labels(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: the file's own, with as many folders before it as tell it from the others.

    The same path given again gets a number: "model.onnx", "model.onnx (2)".
    """
    parts = [path.absolute().parts for path in paths]
    depths = [1] * len(paths)
    while True:
        labels = [str(Path(*part[-depth:])) for part, depth in zip(parts, depths, strict=True)]
        sharing: dict[str, set[tuple[str, ...]]] = {}
        for label, part in zip(labels, parts, strict=True):
            sharing.setdefault(label, set()).add(part)
        deeper = [
            len(sharing[label]) > 1 and depth < len(part)
            for label, part, depth in zip(labels, parts, depths, strict=True)
        ]
        if not any(deeper):
            return _numbered(labels)
        depths = [depth + more for depth, more in zip(depths, deeper, strict=True)]


def _numbered(labels: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    numbered = []
    for label in labels:
        seen[label] += 1
        numbered.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return numbered


def stored_precision(model: onnx.ModelProto) -> str | None:
    """Return the precision in which most of the weights are stored, None for a file without weights of a known one."""
    counts: Counter[str] = Counter()
    constants = [
        attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    for tensor in [*model.graph.initializer, *constants]:
        if tensor.data_type in PRECISIONS:
            counts[PRECISIONS[tensor.data_type]] += math.prod(tensor.dims)
    return max(counts, key=lambda name: counts[name]) if counts else None
