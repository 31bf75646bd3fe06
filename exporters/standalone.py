"""Load and run one ONNX file with onnxruntime and NumPy alone: ``python standalone.py MODEL.onnx``.

A script that :func:`nasdeploy.exporters.runtime.runs_alone` starts in a fresh process; prints a JSON object.
"""

import json
import sys

import numpy as np
import onnxruntime

MUST_BE_ABSENT = ("torch", "onnx", "nasdeploy")
FREE_SIZE = 32  # for a dimension that the file leaves open, other than the batch
GREY, INDEX = 127, 1
TYPES = {
    "tensor(float)": (np.float32, GREY),
    "tensor(float16)": (np.float16, GREY),
    "tensor(double)": (np.float64, GREY),
    "tensor(uint8)": (np.uint8, GREY),
    "tensor(int8)": (np.int8, GREY),
    "tensor(int32)": (np.int32, INDEX),
    "tensor(int64)": (np.int64, INDEX),
    "tensor(bool)": (np.bool_, INDEX),
}


def main(path: str) -> None:
    """Run the model once on a grey image, indices all 1, and print what came out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        free = [1] + [FREE_SIZE] * (len(value.shape) - 1)
        shape = [size if isinstance(size, int) else free[i] for i, size in enumerate(value.shape)]
        dtype, content = TYPES.get(value.type, (np.float32, GREY))
        feeds[value.name] = np.full(shape, content, dtype)
    outputs = session.run(None, feeds)
    result = {
        "shapes": [list(output.shape) for output in outputs],
        "finite": all(bool(np.isfinite(output).all()) for output in outputs),
        "loaded": [name for name in MUST_BE_ABSENT if name in sys.modules],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
