"""Phase 3: one architecture a profile, whose latency is measured before a minute of training is spent on it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nasdeploy.costs.certification import CapCheck
from nasdeploy.costs.table import CostTable
from nasdeploy.errors import InfeasibleError
from nasdeploy.exporters.metadata import architecture_hash
from nasdeploy.files import write_json
from nasdeploy.pipeline.certifying import measure_latency_caps
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.devices import is_by_hand
from nasdeploy.pipeline.memory import memory_of_file, memory_room
from nasdeploy.pipeline.objectives import make_objective
from nasdeploy.pipeline.tables import ProfileCosts, metadata_size, write_untrained
from nasdeploy.profiles import HardwareProfile, Percent, format_quantity
from nasdeploy.runs import read_json
from nasdeploy.searchers.seats import Ranked, SearchOutcome
from nasdeploy.spaces.base import Architecture

SCHEMA = "nasdeploy/architecture/1"
MAX_PROBES = 4
SAFETY = 0.98
"""A cap that a measurement broke is tightened to this share of what would just have held."""


@dataclass(kw_only=True, eq=False)
class Selection:
    """What is being selected for one profile. tightened: factors on its caps. attempt: from 1."""

    costs: ProfileCosts
    tightened: dict[str, float] = field(default_factory=dict)
    attempt: int = 1
    finalist: Ranked | None = None
    num_candidates: int = 0
    objective: float = 0.0
    stored: bool = False


class Selector:
    """Chooses architectures from a finished search; evaluations are shared by all profiles and attempts."""

    def __init__(self, job: Job, outcome: SearchOutcome) -> None:
        self._job = job
        self._outcome = outcome

    def select(self, pending: Sequence[Selection]) -> set[str]:
        """Choose for each of ``pending`` a network that keeps its measured caps, and store it.

        Returns the profiles for which none was found: their folders are left as they are. In the first attempt the
        last choice is then stored all the same, so that the numbers of its exported file can be reported. Raises
        InfeasibleError where the search space has nothing within the caps.
        """
        self._job.observer.start("select", len(pending))
        open_ones = list(pending)
        for _ in range(MAX_PROBES):
            open_ones = [selection for selection in open_ones if self._choose(selection)]
            checks = self._probe(open_ones)
            accepted = [
                s
                for s in open_ones
                if self._accept_size(s)
                and self._accept(s, checks.get(s.costs.profile.name))
                and self._accept_memory(s)
            ]
            for selection in accepted:
                self._store(selection)
            open_ones = [selection for selection in open_ones if selection not in accepted]
            if not open_ones:
                break
        failed = [selection for selection in pending if not selection.stored]
        for selection in failed:
            if selection.attempt == 1:
                self._store(selection)
        self._job.observer.finish("select", {})
        return {selection.costs.profile.name for selection in failed}

    def _choose(self, selection: Selection) -> bool:
        """Choose the best finalist within the tightened caps; return False where there is none."""
        objective = make_objective(selection.costs, tightened=selection.tightened)
        name = selection.costs.profile.name
        found = self._outcome.candidates(name, objective=objective)
        if len(found) == 0:
            if not selection.tightened:
                raise InfeasibleError(
                    f"{name}: no network was found within all caps and "
                    f"{_margins(selection.costs)}; expected higher caps"
                )
            return False
        size = self._job.settings.search.num_finalists
        best = self._outcome.ranked(name, found, objective=objective, size=size)[0]
        selection.finalist = best
        selection.num_candidates = len(found)
        selection.objective = best.loss + float(objective.penalty(np.array([best.architecture.choices]))[0])
        return True

    def _probe(self, selections: Sequence[Selection]) -> dict[str, CapCheck]:
        """Return what was measured of the chosen networks, from the store where they were measured before."""
        known, unknown = {}, {}
        for selection in selections:
            costs, architecture = selection.costs, _chosen(selection)
            if "latency" not in costs.limits.caps or is_by_hand(costs.profile):
                continue  # nobody carries a pack for each choice: the margin of the table has to do
            stored = costs.probes.get(self._hash(architecture))
            if stored is not None and _is_of(CapCheck(**stored), costs.profile):
                known[costs.profile.name] = CapCheck(**stored)
            else:
                unknown[costs.profile.name] = (costs, architecture)
        if unknown:
            measured = self._measure(unknown)
            for name, check in measured.items():
                costs, architecture = unknown[name]
                costs.remember(self._hash(architecture), check)
            known |= measured
        return known

    def _measure(self, unknown: Mapping[str, tuple[ProfileCosts, Architecture]]) -> dict[str, CapCheck]:
        with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
            paths = {}
            for name, (costs, architecture) in unknown.items():
                paths[name] = Path(folder, f"{name}.onnx")
                write_untrained(self._job.space, architecture, paths[name], runtime=costs.profile.runtime)
            found = measure_latency_caps(self._job, [costs.profile for costs, _ in unknown.values()], paths)
        return {name: one.check for name, one in found.items() if one.check is not None}

    def _accept(self, selection: Selection, check: CapCheck | None) -> bool:
        """Return whether the measurement lets the choice stand; tighten the latency cap where it does not.

        It must hold with a margin: two measurements of one file differ by a per cent or two.
        A choice that the machine was too noisy to measure stands: the exported file is measured again.
        """
        if check is None or check.bound is None or check.disturbed:
            return True
        room = latency_room(selection.costs, check)
        if room >= 1.0:
            return True
        predicted = _one(selection.costs.tables["latency"], np.array([_chosen(selection).choices]))
        tighten(selection, "latency", room=room, predicted=predicted)
        return False

    def _accept_size(self, selection: Selection) -> bool:
        """Return whether the file of the chosen network keeps its cap; tighten the cap where it does not.

        Only where sizes are estimated: with layers that share nodes (:mod:`nasdeploy.costs.file_size`).
        """
        costs, architecture = selection.costs, _chosen(selection)
        cap = costs.limits.caps.get("file_size")
        if cap is None or not self._job.space.derived:
            return True
        with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
            path = Path(folder, "model.onnx")
            write_untrained(self._job.space, architecture, path, runtime=costs.profile.runtime)
            found = path.stat().st_size + metadata_size(self._job, costs.profile)
        if found <= cap:
            return True
        predicted = _one(costs.tables["file_size"], np.array([architecture.choices]))
        tighten(selection, "file_size", room=SAFETY * cap / found, predicted=predicted)
        return False

    def _accept_memory(self, selection: Selection) -> bool:
        """Return whether the memory of the chosen network lets the choice stand; tighten the cap where it does not."""
        costs, architecture = selection.costs, _chosen(selection)
        if costs.memory is None or "peak_memory" not in costs.limits.caps or is_by_hand(costs.profile):
            return True
        check = costs.memory.known(self._hash(architecture)) or self._measure_memory(costs, architecture)
        if check.bound is None or (room := memory_room(costs.memory, check)) >= 1.0:
            return True
        predicted = _one(costs.tables["peak_memory"], np.array([architecture.choices]))
        tighten(selection, "peak_memory", room=room, predicted=predicted)
        return False

    def _measure_memory(self, costs: ProfileCosts, architecture: Architecture) -> CapCheck:
        profile = costs.profile
        with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
            path = Path(folder, "model.onnx")
            write_untrained(self._job.space, architecture, path, runtime=profile.runtime)
            check = memory_of_file(self._job, profile, path).check
        assert costs.memory is not None
        assert check is not None
        costs.memory.remember(self._hash(architecture), check)
        return check

    def _hash(self, architecture: Architecture) -> str:
        return architecture_hash(self._job.space.name, self._job.space.to_names(architecture))

    def _store(self, selection: Selection) -> None:
        """Write the choice in place of all that the folder holds of an earlier one."""
        finalist, costs = selection.finalist, selection.costs
        assert finalist is not None
        names = self._job.space.to_names(finalist.architecture)
        choices = np.array([finalist.architecture.choices])
        folder = self._job.folder.model(costs.profile.name)
        folder.discard()
        self._job.folder.discard_exports(costs.profile.name)
        selection.stored = True
        write_json(
            folder.architecture,
            {
                "schema": SCHEMA,
                "profile": costs.profile.name,
                "space": self._job.space.name,
                "architecture": names,
                "hash": architecture_hash(self._job.space.name, names),
                "predicted": {metric: _one(table, choices) for metric, table in costs.tables.items()},
                "validation": {"loss": finalist.loss, "accuracy": finalist.accuracy},
                "objective": selection.objective,
                "num_candidates": selection.num_candidates,
                "num_evaluated": min(self._job.settings.search.num_finalists, selection.num_candidates),
                "attempt": selection.attempt,
                "tightened": selection.tightened,
            },
        )


def select_missing(job: Job, costs: Mapping[str, ProfileCosts], selector: Selector) -> None:
    """Choose an architecture for every profile of the job that has none yet."""
    fresh = [
        Selection(costs=one)
        for name, one in costs.items()
        if not job.folder.model(name).architecture.exists()
    ]
    if fresh:
        selector.select(fresh)


def join_run(job: Job) -> None:
    """Make the profiles of the job a part of its run, once each has a network within its caps."""
    stored = read_json(job.folder.run)
    named = zip(job.profiles, job.settings.profiles, strict=True)
    new = [(profile, source) for profile, source in named if profile.name not in stored["profiles"]]
    if new:
        job.folder.add_profiles({p.name: p.to_dict() for p, _ in new}, sources=[source for _, source in new])


def tighten(selection: Selection, metric: str, *, room: float, predicted: float) -> None:
    """Tighten the cap on a predicted cost so far that a network with a measurement like this one is left out.

    room: what is allowed over what was measured, below 1. predicted: of the network that was measured, so that a
    table which is wrong by some factor is corrected by it.
    """
    cap = make_objective(selection.costs).caps[metric]
    factor = room * predicted / cap
    selection.tightened[metric] = min(selection.tightened.get(metric, 1.0), factor)


def _is_of(check: CapCheck, profile: HardwareProfile) -> bool:
    """Return whether a stored check is of the cap of ``profile``: borrowed ones may be of another."""
    budget = profile.budget.latency
    if budget is None or budget.max is None:
        return False
    cap = budget.max.fraction if isinstance(budget.max, Percent) else budget.max.value
    unit = "fraction" if isinstance(budget.max, Percent) else "ms"
    return (check.cap, check.unit, check.percentile) == (cap, unit, budget.percentile)


def _margins(costs: ProfileCosts) -> str:
    """Return the margins of the tables of what is measured, in words."""
    latency = f"the latency table's margin of {100 * costs.latency.accuracy.quantile90:.1f}%"
    if costs.memory is None:
        return latency
    margin = format_quantity(costs.memory.table.accuracy.quantile90_bytes, "peak_memory")
    return f"{latency} and the memory table's of {margin}"


def latency_room(costs: ProfileCosts, check: CapCheck) -> float:
    """Return the allowed latency over that of the largest block, less a safety margin; 1 or more is accepted."""
    assert check.bound is not None
    if check.unit == "ms":
        return SAFETY * check.cap / check.bound
    low, high = costs.latency.smallest_ms, costs.latency.largest_ms
    allowed, found = low + check.cap * (high - low), low + check.bound * (high - low)
    return SAFETY * allowed / found


def architecture_hash_of(job: Job, profile: str) -> str:
    """Return the hash of the architecture selected for ``profile``."""
    return str(read_json(job.folder.model(profile).architecture, schema=SCHEMA)["hash"])


def stored_architecture(job: Job, profile: str) -> Architecture:
    """Return the architecture selected for ``profile``."""
    stored = read_json(job.folder.model(profile).architecture, schema=SCHEMA)
    return job.space.from_names(stored["architecture"])


def _chosen(selection: Selection) -> Architecture:
    assert selection.finalist is not None
    return selection.finalist.architecture


def _one(table: CostTable, choices: Any) -> float:
    return float(table.of(choices)[0])
