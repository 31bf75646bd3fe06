"""Which decisions matter, as the model of the losses tells it after a search: ``search/importance.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nasdeploy.costs.table import FloatArray
from nasdeploy.files import write_json
from nasdeploy.optim.archive import Archive
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.ladder import Choice
from nasdeploy.optim.main_effects import LossModel, MainEffects, main_effects
from nasdeploy.runs import RunFolder
from nasdeploy.spaces.base import SearchSpace

SCHEMA = "nasdeploy/importance/1"
PLAIN_MODEL = "gaussian-process"
"""What a model that was not chosen among others is."""


@runtime_checkable
class ChosenModel(Protocol):
    """A model of the loss that was chosen among several."""

    @property
    def choice(self) -> Choice:
        """Which one was chosen, and why."""
        ...


@runtime_checkable
class WeighingModel(Protocol):
    """A model of the loss that weighs candidates."""

    def importance(self) -> FloatArray:
        """Return the operation importance weights (D, C)."""
        ...


def store_importance(
    folder: RunFolder, space: SearchSpace, model: LossModel, *, archive: Archive, mask: BoolArray
) -> None:
    """Write what ``model``, fitted to ``archive``, says of every decision; nothing where nothing was evaluated.

    mask: (K, D, C), what each of the profiles allows. Takes less than a second for thousands of evaluations.
    """
    if len(archive.losses) == 0:
        return
    allowed: BoolArray = np.logical_or.reduce(mask)
    effects = main_effects(model, archive.choices, allowed)
    choice = model.choice if isinstance(model, ChosenModel) else None
    weights = model.importance() if isinstance(model, WeighingModel) else None
    write_json(
        folder.importance,
        {
            "schema": SCHEMA,
            "model": PLAIN_MODEL if choice is None else choice.rung,
            "num_evaluations": len(archive.losses),
            "num_architectures": effects.num_architectures,
            "rungs": [] if choice is None else _rungs(choice),
            "decisions": _decisions(space, effects, weights),
        },
    )


def _rungs(choice: Choice) -> list[dict[str, Any]]:
    """Return the models that were compared, the simplest first; none where there was too little to compare on."""
    return [
        {"name": name, "tau": tau, "error": error, "chosen": name == choice.rung}
        for name, (tau, error) in choice.taus.items()
    ]


def _decisions(space: SearchSpace, effects: MainEffects, weights: FloatArray | None) -> list[dict[str, Any]]:
    """Return a row for each decision; a candidate that no profile allows has neither effect nor weight."""
    rows = []
    spreads = zip(effects.ranges.tolist(), effects.errors.tolist(), strict=True)
    for d, (decision, (spread, error)) in enumerate(zip(space.decisions, spreads, strict=True)):
        found = _finite(effects.effects[d].tolist())
        weighed = _finite(weights[d].tolist()) if weights is not None else [None] * len(found)
        rows.append(
            {
                "name": decision.name,
                "range": spread,
                "error": _finite([error])[0],
                "candidates": [
                    {"name": name, "effect": effect, "weight": None if effect is None else weight}
                    for name, effect, weight in zip(decision.candidates, found, weighed, strict=False)
                ],
            }
        )
    return rows


def _finite(values: Iterable[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
