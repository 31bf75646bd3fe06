"""Where the distributions of a search start: uniform, or from what a cheaper search has found."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nasdeploy.costs.table import FloatArray
from nasdeploy.optim import categorical
from nasdeploy.optim.warm_start import elite, warm_theta
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.objectives import make_objective
from nasdeploy.pipeline.random_weight import make_evaluator, scored_archive
from nasdeploy.pipeline.tables import ProfileCosts


def warm_start(job: Job, costs: Mapping[str, ProfileCosts]) -> FloatArray | None:
    """Return θ (K, D, C) of the profiles of ``costs`` as the settings say; None: uniform.

    Networks with random weights are scored for it, or read from the run folder where they were.
    """
    if job.settings.search.warm_start == "none":
        return None
    settings = job.settings.search.random_weight
    archive = scored_archive(job, costs, make_evaluator(job))
    masks = [categorical.mask_array(job.space.num_candidates(), one.mask) for one in costs.values()]
    elites = [
        elite(
            choices=archive.choices,
            losses=archive.losses,
            objective=make_objective(one),
            mask=mask,
            num_elite=settings.num_elite,
        )
        for one, mask in zip(costs.values(), masks, strict=True)
    ]
    return warm_theta(elites, np.stack(masks), smoothing=settings.smoothing)
