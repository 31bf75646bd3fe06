"""What an ONNX file is made of, and what must not be in it: checks that need neither torch nor images."""

from __future__ import annotations

import hashlib
import math
import operator
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from nasdeploy.exporters.files import documentation, nodes_of, parse_model, read_bytes, tensors_of
from nasdeploy.exporters.opsets import MIN_OPSET, supported_opset
from nasdeploy.exporters.runtime import first_line

STANDARD_DOMAINS = ("", "ai.onnx")

# A stack trace, an absolute path of >= 2 parts (but not the "//" of a web address), a drive, a home folder.
MACHINE_PATH = re.compile(
    r"""Traceback\ \(|File\ \\?["']|file://|(?:^|[\s"'=(\[,:])(?:~|/[\w.+@-]+)/[\w.+@-]+|\b[A-Za-z]:\\\w""",
    re.VERBOSE,
)

MIN_IR_OF_CONSTANTS = 4

RELATIONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}

Value = float | int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One condition of the gate: ``value`` ``relation`` ``limit``, such as 0.9995 >= 0.999."""

    name: str
    value: Value
    relation: str
    limit: Value
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the condition holds; never for a value that is not a number."""
        return bool(RELATIONS[self.relation](self.value, self.limit))

    def describe(self) -> str:
        """Return the check in one line."""
        state = "" if self.passed else "; expected"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.name} = {_show(self.value)}{state} {self.relation} {_show(self.limit)}{detail}"

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain data."""
        finite = isinstance(self.value, str) or math.isfinite(self.value)
        return {
            "name": self.name,
            "value": self.value if finite else str(self.value),  # JSON has no NaN
            "relation": self.relation,
            "limit": self.limit,
            "passed": self.passed,
            "detail": self.detail,
        }


def _show(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A value at the border of the graph; dimensions are sizes, names, or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the value as plain data."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureReport:
    """What a file is made of.

    file_size: bytes. operators: {type: number of nodes}. stored_values: numbers that its initialisers hold.
    """

    path: Path
    sha256: str
    file_size: int
    opset: int
    ir_version: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    operators: dict[str, int]
    stored_values: int
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the facts, without the checks, as plain data."""
        return {
            "opset": self.opset,
            "ir_version": self.ir_version,
            "inputs": [value.to_json() for value in self.inputs],
            "outputs": [value.to_json() for value in self.outputs],
            "operators": self.operators,
            "stored_values": self.stored_values,
        }


def inspect_model(path: Path, *, opset: int | None = None, folded: bool = True) -> StructureReport:
    """Return the structure of the file ``path`` with its checks.

    ``opset``: the one that the file must have; None accepts any that runs here. ``folded``: whether batch norm must be
    folded, as in every file of nasdeploy; in a file of others it is no flaw: ONNX Runtime folds it when it loads.
    Raises UsageError for a file that is missing, truncated or not ONNX.
    """
    content = read_bytes(path)
    model = parse_model(content, path)
    return StructureReport(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        file_size=len(content),
        opset=model_opset(model),
        ir_version=model.ir_version,
        inputs=model_inputs(model),
        outputs=tuple(_tensor_info(value) for value in model.graph.output),
        operators=dict(sorted(Counter(node.op_type for node in nodes_of(model)).items())),
        stored_values=sum(math.prod(tensor.dims) for tensor in model.graph.initializer),
        checks=tuple(_checks(model, opset, folded=folded)),
    )


def model_inputs(model: onnx.ModelProto) -> tuple[TensorInfo, ...]:
    """Return what a run must be fed: the inputs without those that the file stores itself."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return tuple(_tensor_info(value) for value in model.graph.input if value.name not in stored)


def model_opset(model: onnx.ModelProto) -> int:
    """Return the version of the standard operator set that ``model`` uses, 0 for none."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    return int(versions.get("", versions.get("ai.onnx", 0)))


def _checks(model: onnx.ModelProto, opset: int | None, *, folded: bool) -> Iterator[Check]:
    yield _validity("onnx_checker", _checker_error(model))
    yield _validity("shape_inference", _shape_error(model))
    yield _opset_check(model_opset(model), opset)
    domains = {entry.domain for entry in model.opset_import} | {node.domain for node in nodes_of(model)}
    yield _none("foreign_domains", sorted(domains - set(STANDARD_DOMAINS)))
    if folded:
        yield _none(
            "batch_norm_nodes",
            [node.name for node in nodes_of(model) if node.op_type == "BatchNormalization"],
        )
    # Before IR version 4 every initialiser had to stand among the inputs, and none could be overwritten.
    stored = {tensor.name for tensor in model.graph.initializer if model.ir_version >= MIN_IR_OF_CONSTANTS}
    yield _none(
        "initializers_among_inputs", [value.name for value in model.graph.input if value.name in stored]
    )
    external = onnx.TensorProto.EXTERNAL
    yield _none("external_tensors", [t.name for t in tensors_of(model) if t.data_location == external])
    yield _none("machine_paths", [where for where, text in documentation(model) if MACHINE_PATH.search(text)])


def _validity(name: str, error: str) -> Check:
    return Check(name=name, value="invalid" if error else "valid", relation="==", limit="valid", detail=error)


def _none(name: str, found: list[str]) -> Check:
    detail = f"the first: {found[0]}" if found else ""
    return Check(name=name, value=len(found), relation="<=", limit=0, detail=detail)


def _opset_check(found: int, wanted: int | None) -> Check:
    if wanted is not None:
        return Check(name="opset", value=found, relation="==", limit=wanted)
    detail = f"files of nasdeploy have {MIN_OPSET} or more" if found < MIN_OPSET else ""
    return Check(name="opset", value=found, relation="<=", limit=supported_opset(), detail=detail)


def _checker_error(model: onnx.ModelProto) -> str:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return first_line(error)
    return ""


def _shape_error(model: onnx.ModelProto) -> str:
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        return first_line(error)
    return ""


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    shape = tuple(_dimension(dim) for dim in tensor.shape.dim)
    return TensorInfo(
        name=value.name, dtype=onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), shape=shape
    )


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) or None
