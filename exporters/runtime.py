"""Running exported files in ONNX Runtime: outputs, predictions and accuracy, on one CPU thread.

Shapes: N images, B a batch, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from nasdeploy.errors import UsageError
from nasdeploy.exporters import standalone
from nasdeploy.exporters.files import parse_model, read_bytes, read_model

if TYPE_CHECKING:
    from torch import Tensor

    from nasdeploy.data.stored import StoredImages

    Images = NDArray[Any] | Tensor
    SlicedImages = Images | StoredImages
    Labels = NDArray[Any] | Tensor

DEFAULT_BATCH = 64
NUM_READ = 512  # images at a time of a set that may be larger than the memory
ALONE_TIMEOUT_S = 120.0
INPUT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


def as_images(images: Images) -> NDArray[Any]:
    """Return ``images`` as an array (N, C, H, W), uint8 or float. Raises UsageError for anything else."""
    array = _to_numpy(images)
    if array.ndim != 4 or len(array) == 0 or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
        raise UsageError(
            f"images: {array.dtype} of shape {array.shape}; "
            "expected uint8 or float (images, channels, height, width)"
        )
    return array


def _to_numpy(values: Images | Labels) -> NDArray[Any]:
    return values if isinstance(values, np.ndarray) else np.asarray(values.detach().cpu().numpy())


class OnnxClassifier:
    """A file in a session of one CPU thread. Raises UsageError where it is no classifier that runs here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_bytes(path)
        parse_model(content, path)  # a clearer message than the runtime's own
        self._session = _session(content, path)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0].shape) != 4:
            raise UsageError(
                f"{path}: inputs of shapes {[value.shape for value in inputs]} and {len(outputs)} outputs; "
                "expected one input (batch, channels, height, width) and one output"
            )
        if inputs[0].type not in INPUT_TYPES:
            raise UsageError(
                f"{path}: its input is {inputs[0].type}; expected one of {', '.join(INPUT_TYPES)}"
            )
        self.input_name: str = inputs[0].name
        self.input_type = INPUT_TYPES[inputs[0].type]
        # A dimension without a fixed size is None in (B, C, H, W).
        self.input_shape = tuple(size if isinstance(size, int) else None for size in inputs[0].shape)

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the file takes, or None for any."""
        return self.input_shape[0]

    def logits(self, images: NDArray[Any], batch_size: int = DEFAULT_BATCH) -> NDArray[np.float32]:
        """Return the outputs (N, K) for images (N, C, H, W).

        A file with a fixed batch size gets batches of that size. Raises UsageError where images do not fit.
        """
        self._check(images)
        size = self.fixed_batch or batch_size
        return np.concatenate(
            [self._run(images[start : start + size]) for start in range(0, len(images), size)]
        )

    def _run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        missing = (self.fixed_batch or len(images)) - len(images)
        # The last batch of a file with a fixed size: fill it up, drop what was filled.
        batch = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
        try:
            (output,) = self._session.run(None, {self.input_name: batch.astype(self.input_type)})
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise UsageError(f"{self.path}: onnxruntime cannot run it: {first_line(error)}") from error
        if output.ndim < 2 or len(output) != len(batch) or any(size != 1 for size in output.shape[2:]):
            raise UsageError(
                f"{self.path}: its output has the shape {output.shape}; expected ({len(batch)}, classes)"
            )
        logits: NDArray[np.float32] = output.reshape(output.shape[:2]).astype(np.float32)
        return logits[: len(images)]

    def _check(self, images: NDArray[Any]) -> None:
        wanted, got = self.input_shape[1:], images.shape[1:]
        if any(size is not None and size != other for size, other in zip(wanted, got, strict=True)):
            expected = "x".join("any" if size is None else str(size) for size in wanted)
            raise UsageError(
                f"{self.path}: images are {'x'.join(map(str, got))}; the model takes {expected} "
                "(channels x height x width)"
            )


def _session(content: bytes, path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise UsageError(f"{path}: onnxruntime cannot load it: {first_line(error)}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxAccuracy:
    """accuracy: top-1 in [0, 1]. predictions: class of each image (N,)."""

    accuracy: float
    predictions: NDArray[np.int64]


def onnx_predictions(
    path: Path, images: SlicedImages, *, batch_size: int = DEFAULT_BATCH
) -> NDArray[np.int64]:
    """Return the class (N,) that the file gives each image (N, C, H, W); images in a file are read part by part.

    Raises UsageError where they do not fit.
    """
    return _predictions(OnnxClassifier(path), images, batch_size)[0]


def _predictions(
    classifier: OnnxClassifier, images: SlicedImages, batch_size: int
) -> tuple[NDArray[np.int64], int]:
    """Return the class of each image, and how many classes the file knows."""
    size = -(-NUM_READ // batch_size) * batch_size
    starts = range(0, max(len(images), 1), size)  # none at all: refused as images, not here
    logits = [classifier.logits(as_images(images[start : start + size]), batch_size) for start in starts]
    return np.concatenate([top1(part) for part in logits]), logits[0].shape[1]


def top1(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the class (N,) of the largest of the logits (N, K)."""
    return np.asarray(logits.argmax(axis=1), np.int64)


def onnx_accuracy(
    path: Path, images: SlicedImages, labels: Labels, *, batch_size: int = DEFAULT_BATCH
) -> OnnxAccuracy:
    """Return the accuracy of the file on images (N, C, H, W) of the classes ``labels`` (N,).

    Raises UsageError where they do not fit.
    """
    predictions, num_classes = _predictions(OnnxClassifier(path), images, batch_size)
    targets = as_labels(labels, len(predictions), num_classes)
    return OnnxAccuracy(accuracy=float((predictions == targets).mean()), predictions=predictions)


def as_labels(labels: Labels, num_images: int, num_classes: int) -> NDArray[np.int64]:
    """Return ``labels`` as an array (N,). Raises UsageError unless there is one in 0..K-1 for each image."""
    array = _to_numpy(labels).astype(np.int64)
    if array.shape != (num_images,):
        raise UsageError(f"labels: shape {array.shape}; expected ({num_images},), one for each image")
    if array.min() < 0 or array.max() >= num_classes:
        raise UsageError(
            f"labels: from {array.min()} to {array.max()}; the model has {num_classes} outputs, "
            f"expected 0 to {num_classes - 1}"
        )
    return array


@dataclass(frozen=True, slots=True, kw_only=True)
class AloneReport:
    """Whether a file ran in a fresh process without torch; ``detail`` says what came out, or why not."""

    passed: bool
    detail: str


def runs_alone(path: Path) -> AloneReport:
    """Load and run ``path`` in a fresh process with onnxruntime and NumPy alone.

    Raises UsageError for a file that is missing, truncated or not ONNX.
    """
    read_model(path)
    # -P: the folder of the script must not shadow the names of installed packages.
    command = [sys.executable, "-P", str(Path(standalone.__file__).resolve()), path.name]
    try:
        done = subprocess.run(
            command,
            cwd=path.resolve().parent,
            capture_output=True,
            text=True,
            timeout=ALONE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return AloneReport(passed=False, detail=f"no answer within {ALONE_TIMEOUT_S:.0f} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return AloneReport(passed=False, detail=lines[-1])
    result = json.loads(done.stdout)
    if result["loaded"]:
        return AloneReport(passed=False, detail=f"the process loaded {', '.join(result['loaded'])}")
    if not result["finite"]:
        return AloneReport(passed=False, detail="the outputs for a grey image are not finite")
    return AloneReport(passed=True, detail=f"outputs of shape {', '.join(map(str, result['shapes']))}")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
