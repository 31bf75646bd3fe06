"""Whether a measured model keeps a cap on its latency or memory: decided from blocks, never from a point estimate.

The largest of five block percentiles is a 1 - 0.5**5 = 96.9 % bound on the median block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from nasdeploy.costs.latency import BlockStats, ModelLatency
from nasdeploy.costs.memory import MemoryUse

__all__ = [
    "MIN_BLOCKS",
    "UNSTABLE_SPREAD",
    "CapCheck",
    "check_cap",
    "check_memory_cap",
    "check_percent_cap",
    "instability",
    "is_astride",
    "is_unstable",
]

MIN_BLOCKS = 5
UNSTABLE_SPREAD = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class CapCheck:
    """A cap and what was measured against it, in ``unit``.

    estimate: median of the blocks. bound: the largest block; both None where no block could be used.
    percentile: of the latency; None for memory, where a block is a process that was started.
    reason: why it is undecided, else empty. disturbed: the machine is why, not the file: too few runs, a rival on the
    core, or a reference model that did not hold still.
    """

    status: Literal["holds", "violated", "undecided"]
    cap: float
    unit: Literal["ms", "fraction", "bytes"]
    percentile: int | None
    estimate: float | None
    bound: float | None
    num_blocks: int
    reason: str = ""
    disturbed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain data."""
        return asdict(self)


def check_cap(
    latency: ModelLatency, cap_ms: float, *, percentile: int = 50, reference: ModelLatency | None = None
) -> CapCheck:
    """Check an absolute cap on a percentile of the wall time, from the blocks that no rival disturbed.

    reference: the reference model in the same blocks; where its medians spread by more than 5 %, the blocks say as
    much about the machine as about the file, and nothing is decided.
    """
    supported = [block for block in latency.blocks if block.wall_ms[percentile] is not None]
    quiet = [block for block in supported if not block.contended_at(percentile)]
    values = [value for block in quiet if (value := block.wall_ms[percentile]) is not None]
    reason = ""
    if len(supported) < MIN_BLOCKS:
        reason = f"too few runs: {len(supported)} of {MIN_BLOCKS} blocks support a p{percentile}"
    elif len(quiet) < MIN_BLOCKS:
        reason = f"contended: {len(quiet)} of {MIN_BLOCKS} blocks were undisturbed"
    elif reference is not None and is_unstable(reference):
        reason = instability(reference)
    return _decide(values, cap_ms, unit="ms", percentile=percentile, reason=reason)


def check_percent_cap(
    latency: ModelLatency,
    cap_fraction: float,
    *,
    smallest: ModelLatency,
    largest: ModelLatency,
    percentile: int = 50,
) -> CapCheck:
    """Check a cap between the smallest (0) and the largest (1) network, all measured in the same blocks.

    Block by block (model - smallest) / (largest - smallest), by CPU time where the session has one thread,
    since no rival changes that.
    """
    by_cpu = latency.conditions.threads == 1
    ratios = []
    for blocks in zip(latency.blocks, smallest.blocks, largest.blocks, strict=True):
        model, low, high = (_time(block, percentile, by_cpu=by_cpu) for block in blocks)
        if model is not None and low is not None and high is not None and high > low:
            ratios.append((model - low) / (high - low))
    reason = ""
    if len(ratios) < MIN_BLOCKS:
        reason = (
            f"only {len(ratios)} of {MIN_BLOCKS} blocks tell the p{percentile} of the smallest network from "
            "that of the largest"
        )
    return _decide(ratios, cap_fraction, unit="fraction", percentile=percentile, reason=reason)


def check_memory_cap(
    use: MemoryUse, cap: float, *, ends: tuple[MemoryUse, MemoryUse] | None = None
) -> CapCheck:
    """Check a cap on the memory that a file adds to a process, from its starts.

    cap: in bytes; with ``ends``, the smallest (0) and the largest (1) network of the space, a share of the way
    between the most that each of them needs.
    """
    unit: Literal["fraction", "bytes"] = "bytes" if ends is None else "fraction"
    values = [float(size) for size in use.added_bytes]
    reason = ""
    if not values:
        reason = "the system does not tell the memory of a process"
    elif len(values) < MIN_BLOCKS:
        reason = f"too few processes: {len(values)} of {MIN_BLOCKS} were started"
    elif ends is not None:
        low, high = (end.largest_bytes or 0 for end in ends)
        values = [(value - low) / (high - low) for value in values] if high > low else []
        reason = "" if values else "the largest network of the space needs no more than the smallest"
    return _decide(values, cap, unit=unit, percentile=None, reason=reason)


def is_astride(check: CapCheck) -> bool:
    """Whether enough undisturbed blocks were measured, and lie on both sides of the cap."""
    return check.status == "undecided" and not check.disturbed


def is_unstable(reference: ModelLatency) -> bool:
    """Whether the reference model's block medians spread too far for this machine to certify anything."""
    return reference.spread > UNSTABLE_SPREAD


def instability(reference: ModelLatency) -> str:
    """Return in one line by how much the machine is unstable; empty where it is not."""
    if not is_unstable(reference):
        return ""
    return (
        f"unstable machine: the reference model took {100 * reference.spread:.1f} % longer in one block than "
        f"in another; expected at most {100 * UNSTABLE_SPREAD:.0f} %: stop other programs and measure again"
    )


def _time(block: BlockStats, percentile: int, *, by_cpu: bool) -> float | None:
    return block.cpu_ms[percentile] if by_cpu else block.wall_ms[percentile]


def _decide(
    values: Sequence[float],
    cap: float,
    *,
    unit: Literal["ms", "fraction", "bytes"],
    percentile: int | None,
    reason: str,
) -> CapCheck:
    estimate = float(np.median(values)) if values else None
    bound = float(max(values)) if values else None
    disturbed = bool(reason)
    status: Literal["holds", "violated", "undecided"] = "undecided"
    if not reason and estimate is not None and bound is not None:
        status = "holds" if bound <= cap else "violated" if estimate > cap else "undecided"
        if status == "undecided":
            reason = "the blocks lie on both sides of the cap"
    return CapCheck(
        status=status,
        cap=cap,
        unit=unit,
        percentile=percentile,
        estimate=estimate,
        bound=bound,
        num_blocks=len(values),
        reason=reason,
        disturbed=disturbed,
    )
