"""Which versions of the standard operator set ("opset") can be written here and run here."""

from __future__ import annotations

from functools import cache

import onnx
import onnxruntime
from onnx import TensorProto, helper

from nasdeploy.errors import ConfigError

MIN_OPSET = 18
DEFAULT_OPSET = 18


def check_opset(opset: int) -> None:
    """Raises ConfigError unless ``opset`` lies between :data:`MIN_OPSET` and :func:`supported_opset`."""
    if opset < MIN_OPSET:
        raise ConfigError(
            f"opset = {opset}: expected {MIN_OPSET} or more, because torch's exporter writes no lower one; "
            f"{DEFAULT_OPSET} runs wherever a lower one is asked for by habit"
        )
    if opset > (highest := supported_opset()):
        raise ConfigError(
            f"opset = {opset}: expected {MIN_OPSET} to {highest}; the installed onnx {onnx.__version__} and "
            f"onnxruntime {onnxruntime.__version__} support no higher one"
        )


@cache
def supported_opset() -> int:
    """Return the highest opset that the installed onnx writes and the installed onnxruntime loads.

    Found by loading a model of one node, since onnxruntime does not say which opsets it knows.
    """
    highest: int = onnx.defs.onnx_opset_version()
    return next(opset for opset in range(highest, 0, -1) if _loads(opset))


def _loads(opset: int) -> bool:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", value[:1], value[1:])
    model = helper.make_model_gen_version(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except (
        Exception
    ):  # onnxruntime's exceptions share no base class; the model is known to be right but for its opset
        return False
    return True
