"""Where the time of an ONNX file goes: by operator type and by node, from a profiled run of its own.

ONNX Runtime's profiler slows a model down and counts whole microseconds, so it never runs beside a measurement:
shares are what to read, times of nodes of a few microseconds are rough. The types are those that the runtime runs
after it has fused and replaced nodes: a convolution with its activation may be one "Conv" or "FusedConv", quantised
ones become "QLinearConv", and "ReorderInput", "QuantizeLinear" or "Cast" may appear that no file names. Beside an
accelerator a node's time is that of launching it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nasdeploy.costs.sessions import HERE, Device, Request, start_requests
from nasdeploy.profiles import Runtime

__all__ = [
    "NodeTime",
    "OperatorProfile",
    "TypeTime",
    "operator_request",
    "profile_operators",
    "summarise_nodes",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTime:
    """A node that the runtime runs. name: "" where it has none. calls: in one run.

    median_us: its time in one run, median of the runs. share: of the sum over all nodes, in [0, 1].
    """

    name: str
    op_type: str
    provider: str
    calls: int
    median_us: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeTime:
    """All nodes of one operator type on one provider; median_us and share are sums over them."""

    op_type: str
    provider: str
    num_nodes: int
    calls: int
    median_us: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorProfile:
    """Operator types and nodes of a file, the longest first.

    runs: over which the medians were taken. run_us: median of a whole run, the profiler's own time included.
    """

    runs: int
    run_us: float
    by_type: tuple[TypeTime, ...]
    nodes: tuple[NodeTime, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the profile as plain data."""
        return {
            "runs": self.runs,
            "run_us": self.run_us,
            "by_type": [asdict(row) for row in self.by_type],
            "nodes": [asdict(row) for row in self.nodes],
        }


def profile_operators(
    path: Path,
    runtime: Runtime,
    *,
    runs: int = 50,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    device: Device = HERE,
) -> OperatorProfile:
    """Profile a file in a fresh process of ``device``: ten runs to warm up, then ``runs`` that count.

    shapes: {input: shape}; others get the batch size for what the file leaves open. A model whose runs take longer
    than 40 s together is profiled in fewer. Raises as :meth:`nasdeploy.costs.sessions.Device.carry_out`.
    """
    request = operator_request(path, runtime, runs=runs, seed=seed, shapes=shapes)
    (result,) = device.carry_out([request]).results
    return summarise_nodes(result)


def operator_request(
    path: Path,
    runtime: Runtime,
    *,
    runs: int = 50,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Request:
    """Return the request that profiles a file."""
    (start,) = start_requests(path, runtime, count=1, seed=seed, shapes=shapes)
    return {**start, "operators": {"runs": runs}}


def summarise_nodes(result: Mapping[str, Any]) -> OperatorProfile:
    """Return the profile in the result of :func:`operator_request`."""
    (model,) = result["models"].values()
    found = model["operators"]
    total = sum(row["median_us"] for row in found["nodes"]) or 1.0
    nodes = [NodeTime(**row, share=row["median_us"] / total) for row in found["nodes"]]
    groups: dict[tuple[str, str], list[NodeTime]] = defaultdict(list)
    for node in nodes:
        groups[node.op_type, node.provider].append(node)
    by_type = [
        TypeTime(
            op_type=op_type,
            provider=provider,
            num_nodes=len(group),
            calls=sum(node.calls for node in group),
            median_us=sum(node.median_us for node in group),
            share=sum(node.share for node in group),
        )
        for (op_type, provider), group in groups.items()
    ]
    return OperatorProfile(
        runs=found["runs"],
        run_us=found["run_us"],
        by_type=tuple(sorted(by_type, key=lambda row: (-row.median_us, row.op_type, row.provider))),
        nodes=tuple(sorted(nodes, key=lambda row: -row.median_us)),  # equal ones stay in the order of the run
    )
