"""Phase 2: the one-shot search for all profiles together."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nasdeploy.files import write_json, write_whole
from nasdeploy.networks import Supernet
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.tables import ProfileCosts
from nasdeploy.progress import Value
from nasdeploy.runs import read_json
from nasdeploy.searchers.oneshot import SearchStep, run_search, to_architectures

RESULT_SCHEMA = "nasdeploy/search/1"
STATE_SCHEMA = "nasdeploy/search-state/1"
SHOWN_METRICS = ("latency", "flops", "params")
HEADER = ("step", "stage", "seconds", "loss")
LOSS_INTERVAL = 10


def make_objective(costs: ProfileCosts, *, tightened: Mapping[str, float] | None = None) -> Objective:
    """Return the objective of a profile.

    Its latency cap keeps the margin that the table needs. tightened: factors on caps, after a measurement broke one.
    """
    caps = dict(costs.limits.caps)
    if "latency" in caps:
        caps["latency"] *= costs.latency_margin
    for metric, factor in (tightened or {}).items():
        caps[metric] *= factor
    return Objective(
        tables=costs.tables,
        caps=caps,
        coefficients=costs.limits.coefficients,
        references=costs.limits.references,
    )


def make_supernet(job: Job) -> Supernet:
    """Return the untrained supernet on the training device."""
    supernet = Supernet(job.space, job.normalise(), job.generator("supernet")).to(job.device)
    return supernet.to(memory_format=torch.channels_last)


def make_optimizer(job: Job, costs: Mapping[str, ProfileCosts]) -> PooledOptimizer:
    """Return the K distributions at their start."""
    return PooledOptimizer(
        num_candidates=job.space.num_candidates(),
        objectives=[make_objective(one) for one in costs.values()],
        masks=[one.mask for one in costs.values()],
        estimator=job.settings.search.estimator,
    )


def searched(job: Job, costs: Mapping[str, ProfileCosts]) -> tuple[Supernet, PooledOptimizer]:
    """Return the trained supernet and the distributions: from the run folder, or searched now and stored there."""
    supernet, optimizer = make_supernet(job), make_optimizer(job, costs)
    if all(
        path.exists() for path in (job.folder.search_result, job.folder.supernet, job.folder.search_state)
    ):
        supernet.load_state_dict(job.folder.load_tensors(job.folder.supernet))
        optimizer.load_state_dict(read_json(job.folder.search_state, schema=STATE_SCHEMA)["optimizer"])
    else:
        _search(job, costs, supernet, optimizer)
    return supernet, optimizer


def _search(
    job: Job, costs: Mapping[str, ProfileCosts], supernet: Supernet, optimizer: PooledOptimizer
) -> None:
    settings = job.settings.search
    started = time.perf_counter()
    job.observer.start("search", settings.num_steps)
    history = _History(list(costs), optimizer)
    steps = run_search(
        supernet,
        optimizer,
        train=job.batches(job.train, purpose="search/train", batch_size=settings.batch_size, augment=True),
        valid=job.batches(
            job.valid, purpose="search/valid", batch_size=settings.loss_batch_size, augment=False
        ),
        settings=settings,
        rng=np.random.default_rng(job.seed("search/architectures")),
    )
    for step in steps:
        row = history.add(step, time.perf_counter() - started)
        job.observer.advance("search", step.step, row)
    seconds = time.perf_counter() - started
    job.folder.save_tensors(job.folder.supernet, supernet.state_dict())
    write_json(job.folder.search_state, {"schema": STATE_SCHEMA, "optimizer": optimizer.state_dict()})
    write_whole(job.folder.search_history, history.to_csv().encode())
    write_json(job.folder.search_result, _result(job, optimizer, history, seconds))
    job.observer.finish("search", {"seconds": round(seconds, 1)})


def _result(job: Job, optimizer: PooledOptimizer, history: _History, seconds: float) -> dict[str, object]:
    settings = job.settings.search
    modes = to_architectures(optimizer.modes())
    diagnostics = optimizer.diagnostics
    return {
        "schema": RESULT_SCHEMA,
        "num_steps": settings.num_steps,
        "seconds": seconds,
        "images_per_second": settings.num_steps * settings.batch_size / seconds,
        "num_evaluations": optimizer.num_steps * settings.num_loss_samples,
        "estimator": settings.estimator,
        "profiles": {
            name: {
                "mode": job.space.to_names(modes[k]),
                "entropy": diagnostics.entropy[k] if diagnostics else None,
                "ess": history.mean_ess(k),
                "expected_costs": {metric: optimizer.expected_cost(k, metric) for metric in SHOWN_METRICS},
            }
            for k, name in enumerate(history.names)
        },
    }


class _History:
    """One row a step, for ``history.csv`` and for progress."""

    def __init__(self, names: list[str], optimizer: PooledOptimizer) -> None:
        self.names = names
        self._optimizer = optimizer
        self._rows: list[dict[str, Value]] = []
        self._losses: list[Tensor] = []  # on the device: reading one waits for it
        self._shown_loss: Value = ""
        self._ess: list[tuple[float, ...]] = []

    def add(self, step: SearchStep, seconds: float) -> dict[str, Value]:
        diagnostics = step.diagnostics
        row: dict[str, Value] = {
            "step": step.step,
            "stage": "warm-up" if diagnostics is None else "search",
            "seconds": round(seconds, 3),
        }
        self._losses.append(step.loss)
        if step.step % LOSS_INTERVAL == 1:
            loss = float(step.loss)
            self._shown_loss = round(loss, 6) if math.isfinite(loss) else "not finite"
        row["loss"] = self._shown_loss
        if diagnostics is not None:
            self._ess.append(diagnostics.ess)
        for k, name in enumerate(self.names):
            row[f"ess.{name}"] = round(diagnostics.ess[k], 3) if diagnostics else ""
            row[f"stepped.{name}"] = int(diagnostics.stepped[k]) if diagnostics else ""
            row[f"entropy.{name}"] = round(diagnostics.entropy[k], 4) if diagnostics else ""
            for metric in SHOWN_METRICS:
                row[f"{metric}.{name}"] = float(f"{self._optimizer.expected_cost(k, metric):.6g}")
        self._rows.append(row)
        return row

    def mean_ess(self, k: int) -> float | None:
        return float(np.mean([ess[k] for ess in self._ess])) if self._ess else None

    def to_csv(self) -> str:
        text = io.StringIO()
        losses = torch.stack(self._losses).tolist()
        rows = [{**row, "loss": round(loss, 6)} for row, loss in zip(self._rows, losses, strict=True)]
        writer = csv.DictWriter(
            text, fieldnames=[*HEADER, *(k for k in rows[0] if k not in HEADER)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
