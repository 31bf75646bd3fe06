"""Do certified files keep their latency caps later? Each is measured again in ten later processes.

    python tests/benchmarks/certificates_hold.py RUN [--processes 10] [--pause 0]

RUN is the folder of a finished build, on the machine of the build. A process is one block as the certification makes
them, with the same number of runs: the files that ship for one runtime, with the smallest and the largest network of
the space. An absolute cap holds in it where the percentile of the wall clock is at most the cap; a percentage where
(file - smallest) / (largest - smallest) is, by CPU time for one thread. The certificate said more than the median block
holds, and less than every block does: with five blocks it bounds the median block at 96.9 %. Prints how many of the
processes hold, the largest excess over the cap, and what the certificate had measured. Run it alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nasdeploy.costs.certification import check_percent_cap
from nasdeploy.costs.device.timing import RUNS_FOR_PERCENTILE
from nasdeploy.costs.latency import ModelLatency, measure_models
from nasdeploy.costs.machine import machine_fingerprint
from nasdeploy.files import write_json
from nasdeploy.pipeline.context import Job, finished_job
from nasdeploy.pipeline.tables import write_untrained
from nasdeploy.profiles import HardwareProfile, Runtime, format_quantity
from nasdeploy.progress import Silent
from nasdeploy.runs import read_json

SCHEMA = "nasdeploy/certificates-benchmark/1"
# A name of a profile never begins with a space.
SMALLEST, LARGEST = " smallest", " largest"
HEADER = (
    "profile",
    "file",
    "cap",
    "certified: median, largest block",
    "later processes that hold",
    "later: median, largest",
    "largest excess",
    "contended",
)


@dataclass(kw_only=True)
class Certificate:
    """A certified latency cap, and what later processes measured, in its unit: "ms" or "fraction"."""

    profile: HardwareProfile
    path: Path
    cap: float
    unit: str
    estimate: float
    bound: float
    later: list[float] = field(default_factory=list)
    contended: int = 0

    @property
    def holding(self) -> int:
        """How many of the later processes keep the cap."""
        return sum(value <= self.cap for value in self.later)

    @property
    def percentile(self) -> int:
        """The percentile that the cap is for."""
        budget = self.profile.budget.latency
        assert budget is not None
        return budget.percentile

    def add(self, times: Mapping[str, ModelLatency]) -> None:
        """Add what one process measured."""
        latency = times[self.profile.name]
        self.contended += latency.contended_blocks
        if self.unit == "ms":
            value = latency.percentile_ms(self.percentile)
        else:
            value = check_percent_cap(
                latency,
                self.cap,
                smallest=times[SMALLEST],
                largest=times[LARGEST],
                percentile=self.percentile,
            ).estimate
        assert value is not None
        self.later.append(value)

    def show(self, value: float) -> str:
        """Return a value in the cap's unit."""
        return f"{100 * value:.2f} %" if self.unit == "fraction" else format_quantity(value, "latency")

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        ordered = sorted(self.later)
        excess = max(0.0, ordered[-1] / self.cap - 1.0)
        return (
            self.profile.name,
            self.path.name,
            f"p{self.percentile} {self.show(self.cap)}",
            f"{self.show(self.estimate)}, {self.show(self.bound)}",
            f"{self.holding} of {len(ordered)}",
            f"{self.show(ordered[len(ordered) // 2])}, {self.show(ordered[-1])}",
            "none" if self.holding == len(ordered) else f"{100 * excess:.2f} % of the cap",
            str(self.contended),
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        names = ("cap", "unit", "estimate", "bound", "percentile", "holding", "later", "contended")
        return {"profile": self.profile.name, "file": self.path.name} | {
            name: getattr(self, name) for name in names
        }


def certificate_of(job: Job, profile: HardwareProfile) -> Certificate | None:
    """Return the latency certificate of a profile; None where its file has none."""
    folder = job.folder.model(profile.name)
    if not folder.metrics.exists():
        return None
    metrics = read_json(folder.metrics)
    caps = [cap for cap in metrics["caps"] if cap["metric"] == "latency" and cap["status"] == "holds"]
    if metrics["status"] != "certified" or not caps:
        return None
    (cap,) = caps
    return Certificate(
        profile=profile,
        path=folder.shipped(),
        cap=cap["cap"],
        unit=cap["unit"],
        estimate=cap["value"],
        bound=cap["bound"],
    )


def measure_group(
    job: Job, certificates: Sequence[Certificate], *, processes: int, pause: float, smoke: bool
) -> None:
    """Measure the files of one runtime in ``processes`` processes, one after the other."""
    runtime: Runtime = certificates[0].profile.runtime
    settings = job.settings.measure
    # Like the certification: enough runs in each process for the percentiles, with a tenth to spare.
    needed = max(round(1.1 * RUNS_FOR_PERCENTILE[one.percentile]) for one in certificates)
    runs = max(-(-settings.min_runs // settings.blocks), needed)
    seconds = settings.min_seconds / settings.blocks
    mask = job.space.candidate_mask(runtime.channel_multiple)
    with tempfile.TemporaryDirectory() as name:
        files = {one.profile.name: one.path for one in certificates}
        for end, architecture in (
            (SMALLEST, job.space.smallest(mask)),
            (LARGEST, job.space.largest(mask)),
        ):
            files[end] = Path(name, f"{end.strip()}.onnx")
            write_untrained(job.space, architecture, files[end], runtime=runtime)
        for n in range(processes):
            times = measure_models(
                files,
                runtime,
                blocks=1,
                min_runs=needed if smoke else runs,
                min_seconds=0.0 if smoke else seconds,
                seed=1000 + n,
            )
            for one in certificates:
                one.add(times)
            time.sleep(pause if n + 1 < processes else 0.0)


def read_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two processes")
    parser.add_argument("--output", type=Path, help="all values as JSON")
    parser.add_argument("--smoke", action="store_true", help="as few runs as possible: to see that it works")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    job = finished_job(arguments.run, Silent())
    groups: dict[tuple[str, int], list[Certificate]] = defaultdict(list)
    for profile in job.profiles:
        certificate = certificate_of(job, profile)
        if certificate is None:
            print(f"{profile.name}: no certified latency cap; left out")
        else:
            groups[profile.runtime.key(), profile.runtime.channel_multiple].append(certificate)
    certificates = [one for group in groups.values() for one in group]
    if not certificates:
        raise SystemExit(f"{arguments.run}: no file with a certified latency cap; expected a finished build")
    for group in groups.values():
        measure_group(job, group, processes=arguments.processes, pause=arguments.pause, smoke=arguments.smoke)
    rows = [HEADER, ("---",) * len(HEADER), *(one.cells() for one in certificates)]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    whole = sum(one.holding == len(one.later) for one in certificates)
    total = sum(len(one.later) for one in certificates)
    machine = machine_fingerprint()
    print(
        f"\n{whole} of {len(certificates)} certificates hold in every process, "
        f"{sum(one.holding for one in certificates)} of {total} processes hold\n"
        f"{machine['cpu']}, {machine['release']}, Python {machine['python']}, onnxruntime {machine['onnxruntime']}"
    )
    if arguments.output:
        write_json(
            arguments.output,
            {"schema": SCHEMA, "machine": machine, "certificates": [one.to_json() for one in certificates]},
        )


if __name__ == "__main__":
    main()
