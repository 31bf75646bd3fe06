"""Reading, cleaning and writing ONNX files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from nasdeploy.costs.graphs import serialise
from nasdeploy.errors import UsageError
from nasdeploy.exporters.base import ExportedModel
from nasdeploy.files import write_whole


def read_model(path: Path) -> onnx.ModelProto:
    """Return the model in ``path``, external data not loaded. Raises UsageError where there is none."""
    return parse_model(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """Return the content of ``path``. Raises UsageError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); expected an ONNX file") from error


def parse_model(content: bytes, path: Path) -> onnx.ModelProto:
    """Return the model that ``content``, read from ``path``, holds. Raises UsageError where it is none."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise UsageError(f"{path}: not an ONNX file, or cut short ({len(content)} bytes)") from error
    # Protobuf takes an empty file, and a file cut between two fields, for a message.
    if not (model.ir_version and model.opset_import and model.graph.output):
        raise UsageError(f"{path}: not an ONNX model, or cut short ({len(content)} bytes, no complete graph)")
    return model


def strip_model(model: onnx.ModelProto) -> None:
    """Clear what describes how the file was made: doc strings and metadata everywhere, unused operator sets.

    torch's exporter leaves stack traces with the paths of the machine there, 28 % of a small file.
    """
    used = {node.domain for node in nodes_of(model)}
    used |= {function.domain for function in model.functions} | {""}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    for message in [model, *_messages(model)]:
        for field in ("doc_string", "metadata_props"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _messages(message: Any) -> Iterator[Any]:
    """Yield every protobuf message inside ``message``, at any depth: subgraphs, functions, tensors."""
    for _, value in message.ListFields():
        for item in [value] if hasattr(value, "ListFields") else value if _holds_messages(value) else []:
            yield item
            yield from _messages(item)


def nodes_of(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of ``model``, those of subgraphs and functions too."""
    return (message for message in _messages(model) if isinstance(message, onnx.NodeProto))


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every stored tensor of ``model``: initialisers and attributes, at any depth."""
    return (message for message in _messages(model) if isinstance(message, onnx.TensorProto))


def _holds_messages(value: Any) -> bool:
    return (
        not isinstance(value, str | bytes | int | float)
        and len(value) > 0
        and hasattr(value[0], "ListFields")
    )


def documentation(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Yield (where, text) for every doc string and metadata value of ``model``, at any depth."""
    for message in [model, *_messages(model)]:
        where = f"{type(message).__name__.removesuffix('Proto')} {getattr(message, 'name', '')}".strip()
        if text := getattr(message, "doc_string", ""):
            yield where, text
        for entry in getattr(message, "metadata_props", ()):
            yield f"{where}, {entry.key}", entry.value


def save_model(
    model: onnx.ModelProto, *, path: Path, opset: int, exporter: str, metadata: Mapping[str, str]
) -> ExportedModel:
    """Strip ``model``, give it ``metadata`` (by sorted keys) and write it: same input, same bytes."""
    strip_model(model)
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])
    content = serialise(model)
    write_whole(path, content)
    return ExportedModel(
        path=path,
        opset=opset,
        exporter=exporter,
        file_size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
