"""Load and run one ONNX file with onnxruntime and NumPy alone: ``python standalone.py MODEL.onnx``.

A script that :func:`nasdeploy.exporters.runtime.runs_alone` starts in a fresh process; prints a JSON object.
"""

import json
import sys

import numpy as np
import onnxruntime

MUST_BE_ABSENT = ("torch", "onnx", "nasdeploy")
FREE_SIZE = 32  # for a dimension that the file leaves open, other than the batch


def main(path: str) -> None:
    """Run the model once on a grey image and print what came out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {}
    for value in session.get_inputs():
        free = [1] + [FREE_SIZE] * (len(value.shape) - 1)
        shape = [size if isinstance(size, int) else free[i] for i, size in enumerate(value.shape)]
        feeds[value.name] = np.full(shape, 127, np.float16 if value.type == "tensor(float16)" else np.float32)
    outputs = session.run(None, feeds)
    result = {
        "shapes": [list(output.shape) for output in outputs],
        "finite": all(bool(np.isfinite(output).all()) for output in outputs),
        "loaded": [name for name in MUST_BE_ABSENT if name in sys.modules],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
