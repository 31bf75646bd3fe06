"""The gate: does the file compute what the network computes, on real images, and does it run alone?

Random images or random weights prove nothing: logits of 1e-10 agree within any tolerance. Hence a minimum of
real images, differences relative to the range of the outputs, and a check that outputs depend on the images.

Shapes: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nasdeploy.errors import GateError
from nasdeploy.exporters.metadata import read_metadata
from nasdeploy.exporters.runtime import (
    DEFAULT_BATCH,
    OnnxClassifier,
    as_images,
    as_labels,
    onnx_accuracy,
    onnx_predictions,
    runs_alone,
    top1,
)
from nasdeploy.exporters.structure import Check, StructureReport, inspect_model

if TYPE_CHECKING:
    from nasdeploy.exporters.runtime import Images, Labels, SlicedImages

__all__ = [
    "Check",
    "StructureReport",
    "Verification",
    "VerifyLimits",
    "inspect_model",
    "onnx_accuracy",
    "onnx_predictions",
    "runs_alone",
    "verify_export",
    "verify_file",
]

SCHEMA = "nasdeploy/verify/1"
MIN_VARIATION = 0.01
NUM_COMPARED_ALONE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyLimits:
    """What the file may differ by; the defaults are those for fp32. None: reported, not limited.

    max_difference: largest |Δ| of a logit, as a fraction of the range of the network's outputs.
    min_top1_agreement: fraction of images that get the same class. max_accuracy_drop: network minus file, in
    [0, 1]. min_images: how many real images the comparison must rest on.
    """

    max_difference: float | None = 1e-4
    min_top1_agreement: float | None = 0.999
    max_accuracy_drop: float | None = 0.001
    min_images: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was compared, and every check of the gate. None: not compared.

    output_range: largest minus smallest logit of the network. max_difference: as a fraction of it.
    accuracy: measured from the file; network_accuracy: from the network, on the same images.
    """

    structure: StructureReport
    checks: tuple[Check, ...]
    num_images: int = 0
    output_range: float | None = None
    max_difference: float | None = None
    top1_agreement: float | None = None
    accuracy: float | None = None
    network_accuracy: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.passed)

    def require(self) -> None:
        """Raises GateError, naming the first check that failed with its value and limit."""
        if self.passed:
            return
        others = f"; {len(self.failures) - 1} more checks failed" if len(self.failures) > 1 else ""
        raise GateError(f"{self.structure.path.name}: {self.failures[0].describe()}{others}")

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data, after ``schemas/verify.schema.json``."""
        return {
            "schema": SCHEMA,
            "file": self.structure.path.name,
            "sha256": self.structure.sha256,
            "file_size": self.structure.file_size,
            "passed": self.passed,
            "num_images": self.num_images,
            "output_range": _finite(self.output_range),
            "max_difference": _finite(self.max_difference),
            "top1_agreement": self.top1_agreement,
            "accuracy": self.accuracy,
            "network_accuracy": self.network_accuracy,
            "checks": [check.to_json() for check in self.checks],
            "structure": self.structure.to_json(),
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def verify_export(
    path: Path,
    network: nn.Module,
    images: Images,
    *,
    labels: Labels | None = None,
    limits: VerifyLimits | None = None,
    opset: int | None = None,
    batch_size: int = DEFAULT_BATCH,
) -> Verification:
    """Compare the file ``path`` with the network that it was exported from, on real images.

    Images (N, C, H, W), 0..255; ``labels`` (N,) give the accuracy of both. The network is evaluated as a
    copy, on the CPU. Nothing is compared where the file cannot run at all. A check that fails is in the
    result (:meth:`Verification.require`). Raises UsageError for a file that is not ONNX, and for images or
    labels that do not fit it; GateError where file and network differ in the number of classes.
    """
    limits = limits or VerifyLimits()
    array = as_images(images)
    structure, checks = _standing_alone(path, opset)
    checks += (Check(name="real_images", value=len(array), relation=">=", limit=limits.min_images),)
    if not checks[-2].passed:
        return Verification(structure=structure, checks=checks)
    classifier = OnnxClassifier(path)
    got = classifier.logits(array, batch_size)
    expected = network_logits(network, array, batch_size)
    comparison = _Comparison.of(expected, got)
    checks += comparison.checks(limits)
    if classifier.fixed_batch is None and limits.max_difference is not None:
        checks += (_batch_check(classifier, array, got, comparison.output_range, limits.max_difference),)
    result = Verification(
        structure=structure,
        checks=checks,
        num_images=len(array),
        output_range=comparison.output_range,
        max_difference=comparison.max_difference,
        top1_agreement=comparison.top1_agreement,
    )
    return (
        result
        if labels is None
        else _with_accuracy(result, labels, expected=expected, got=got, limits=limits)
    )


def verify_file(
    path: Path,
    images: SlicedImages | None = None,
    *,
    labels: Labels | None = None,
    batch_size: int = DEFAULT_BATCH,
) -> Verification:
    """Check a file without its network: structure, a run in a fresh process, accuracy where there are labels.

    Batch norm must be folded in a file of nasdeploy, which its metadata tells, and may stand in a file of others.
    Raises UsageError for a file that is not ONNX, and for images or labels that do not fit it.
    """
    structure, checks = _standing_alone(path, None, folded=bool(read_metadata(path)))
    if images is None or labels is None or not checks[-1].passed:
        return Verification(structure=structure, checks=checks)
    accuracy = onnx_accuracy(path, images, labels, batch_size=batch_size)
    return Verification(
        structure=structure, checks=checks, num_images=len(accuracy.predictions), accuracy=accuracy.accuracy
    )


def _standing_alone(
    path: Path, opset: int | None, *, folded: bool = True
) -> tuple[StructureReport, tuple[Check, ...]]:
    """Return the structure, and its checks followed by that of the run in a fresh process."""
    structure = inspect_model(path, opset=opset, folded=folded)
    alone = runs_alone(path)
    answer = "runs" if alone.passed else "fails"
    check = Check(name="runs_alone", value=answer, relation="==", limit="runs", detail=alone.detail)
    return structure, (*structure.checks, check)


@torch.no_grad()
def network_logits(network: nn.Module, images: NDArray[Any], batch_size: int) -> NDArray[np.float32]:
    """Return the logits (N, K) for images (N, C, H, W), by a copy in evaluation mode on the CPU."""
    module = copy.deepcopy(network).cpu().eval()
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    return np.concatenate([module(torch.from_numpy(batch.astype(np.float32))).numpy() for batch in batches])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    output_range: float
    variation: float
    max_difference: float
    top1_agreement: float

    @classmethod
    def of(cls, expected: NDArray[np.float32], got: NDArray[np.float32]) -> _Comparison:
        """Compare logits (N, K) of the network and of the file."""
        if expected.shape != got.shape:
            raise GateError(
                f"the file gives outputs of shape {got.shape}; expected {expected.shape}, the network's"
            )
        output_range = _largest_difference(expected.max(), expected.min())
        variation = _largest_difference(expected.max(axis=0), expected.min(axis=0))  # over K classes
        return cls(
            output_range=output_range,
            variation=_ratio(variation, output_range),
            max_difference=_ratio(_largest_difference(expected, got), output_range),
            top1_agreement=float((top1(expected) == top1(got)).mean()),
        )

    def checks(self, limits: VerifyLimits) -> tuple[Check, ...]:
        """Return the checks of the comparison; those without a limit are left out."""
        rows = (
            ("output_variation", self.variation, ">=", MIN_VARIATION),
            ("max_difference", self.max_difference, "<=", limits.max_difference),
            ("top1_agreement", self.top1_agreement, ">=", limits.min_top1_agreement),
        )
        return tuple(
            Check(name=name, value=value, relation=relation, limit=limit)
            for name, value, relation, limit in rows
            if limit is not None
        )


def _largest_difference(a: NDArray[np.float32] | np.float32, b: NDArray[np.float32] | np.float32) -> float:
    with np.errstate(invalid="ignore"):  # ∞ - ∞: not a number, which no check passes
        return float(np.abs(a - b).max())


def _ratio(value: float, output_range: float) -> float:
    """Return value / range; NaN where the outputs are all the same, so that no check of it passes."""
    return value / output_range if output_range > 0 else float("nan")


def _batch_check(
    classifier: OnnxClassifier,
    images: NDArray[Any],
    got: NDArray[np.float32],
    output_range: float,
    limit: float,
) -> Check:
    """Compare images that were run together with the same images run one by one."""
    alone = classifier.logits(images[:NUM_COMPARED_ALONE], batch_size=1)
    difference = _ratio(_largest_difference(alone, got[:NUM_COMPARED_ALONE]), output_range)
    return Check(name="batch_size_difference", value=difference, relation="<=", limit=limit)


def _with_accuracy(
    result: Verification,
    labels: Labels,
    *,
    expected: NDArray[np.float32],
    got: NDArray[np.float32],
    limits: VerifyLimits,
) -> Verification:
    targets = as_labels(labels, *got.shape)
    right_network, right_file = (int((top1(logits) == targets).sum()) for logits in (expected, got))
    checks = result.checks
    if limits.max_accuracy_drop is not None:
        # By counts: 0.9 - 0.899 > 0.001 in floating point.
        drop = (right_network - right_file) / len(targets)
        checks += (Check(name="accuracy_drop", value=drop, relation="<=", limit=limits.max_accuracy_drop),)
    return replace(
        result,
        checks=checks,
        accuracy=right_file / len(targets),
        network_accuracy=right_network / len(targets),
    )
