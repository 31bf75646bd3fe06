"""A large space with a known loss and an additive latency: once-for-all's MobileNetV3 on a phone.

Source of the space, of its encoding and of the layers that a latency is summed over: Cai et al., *Once-for-All:
Train One Network and Specialize it for Efficient Deployment*, ICLR 2020 (arXiv 1908.09791), with the published
accuracy predictor (an MLP) and the latency table of a Samsung Note 10, width multiplier 1.2, input 224 x 224.

45 decisions: for each of five units its depth (2, 3, 4), then for each of its four blocks kernel (3, 5, 7) and
expansion (3, 4, 6). About 2e19 distinct networks. The optimum is not known: :func:`long_search` looks for it with the
true losses, some 400 000 of them per cap.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tabular_problems import Problem

from nasdeploy.costs.table import CostTable, Factor, FloatArray, IntArray
from nasdeploy.errors import ConfigError
from nasdeploy.optim import categorical
from nasdeploy.optim.objective import Objective

RESOLUTION = 224
NUM_UNITS, MAX_DEPTH = 5, 4
DEPTHS, KERNELS, EXPANSIONS = (2, 3, 4), (3, 5, 7), (3, 4, 6)
NUM_CANDIDATES = (3,) * (NUM_UNITS * (1 + 2 * MAX_DEPTH))
# per unit: input channels and size, output channels, stride of its first block, squeeze-excitation, h-swish
UNITS = (
    (24, 112, 32, 2, 0, 0),
    (32, 56, 48, 2, 1, 0),
    (48, 28, 96, 2, 0, 1),
    (96, 14, 136, 1, 1, 1),
    (136, 14, 192, 2, 1, 1),
)
FIXED_LAYERS = (
    "Conv-input:224x224x3-output:112x112x24",
    "expanded_conv-input:112x112x24-output:112x112x24-expand:24-kernel:3-stride:1-idskip:1-se:0-hs:0",
    "Conv_1-input:7x7x192-output:7x7x1152",
    "AvgPool2D-input:7x7x1152-output:1x1x1152",
    "Conv_2-input:1x1x1152-output:1x1x1536",
    "Logits-input:1x1x1536-output:1000",
)
SEARCH_ROUNDS = 40
"""Of :func:`long_search`."""
NUM_CAPS = 8
CAP_SHARES = (0.1, 0.6)
"""The caps are spread from 10 % to 60 % of the way from the fastest to the slowest network: above, none binds."""


def depth_decision(unit: int) -> int:
    """Return the decision that holds the depth of ``unit``."""
    return unit * (1 + 2 * MAX_DEPTH)


def block_decisions(unit: int, block: int) -> tuple[int, int]:
    """Return the decisions that hold the kernel and the expansion of a block."""
    first = depth_decision(unit) + 1 + 2 * block
    return first, first + 1


def block_key(unit: int, block: int, kernel: int, expansion: int) -> str:
    """Return the name of a block in the latency table."""
    channels, size, out_channels, stride, se, hs = UNITS[unit]
    out_size = size // stride
    if block > 0:
        channels, size, stride = out_channels, out_size, 1
    return (
        f"expanded_conv-input:{size}x{size}x{channels}-output:{out_size}x{out_size}x{out_channels}"
        f"-expand:{channels * expansion}-kernel:{kernel}-stride:{stride}-idskip:{int(block > 0)}-se:{se}-hs:{hs}"
    )


def latency_table(means: Mapping[str, float]) -> CostTable:
    """Return the latency in ms: one factor per block, over kernel and expansion and, where it may lack, depth."""
    factors = []
    for unit in range(NUM_UNITS):
        for block in range(MAX_DEPTH):
            times = np.array([[means[block_key(unit, block, k, e)] for e in EXPANSIONS] for k in KERNELS])
            decisions: tuple[int, ...] = block_decisions(unit, block)
            if block >= min(DEPTHS):
                times = np.stack([times if depth > block else 0.0 * times for depth in DEPTHS])
                decisions = (depth_decision(unit), *decisions)
            factors.append(Factor(decisions, times))
    return CostTable(tuple(factors), sum(means[key] for key in FIXED_LAYERS))


def features(choices: IntArray) -> FloatArray:
    """Return the predictor's input (n, 128): kernels and expansions of 20 blocks and 8 resolutions as one-hot.

    What a block that lacks would have chosen is left at zero.
    """
    blocks = choices.reshape(len(choices), NUM_UNITS, 1 + 2 * MAX_DEPTH)
    depth = np.array(DEPTHS)[blocks[:, :, 0]]  # (n, 5)
    present = np.arange(MAX_DEPTH) < depth[:, :, None]  # (n, 5, 4)
    encoded = np.zeros((len(choices), 128))
    for part, first in enumerate((1, 2)):
        one_hot = np.eye(3)[blocks[:, :, first::2]] * present[..., None]  # (n, 5, 4, 3)
        encoded[:, 60 * part : 60 * (part + 1)] = one_hot.reshape(len(choices), 60)
    encoded[:, 120 + (RESOLUTION - 112) // 16] = 1.0
    return encoded


def canonical(choices: IntArray) -> IntArray:
    """Return ``choices`` (n, 45) with the first candidates wherever a block lacks: one form of each network."""
    blocks = choices.reshape(len(choices), NUM_UNITS, 1 + 2 * MAX_DEPTH).copy()
    depth = np.array(DEPTHS)[blocks[:, :, 0]]
    lacking = np.repeat(np.arange(MAX_DEPTH) >= depth[:, :, None], 2, axis=-1)  # (n, 5, 8)
    blocks[:, :, 1:][lacking] = 0
    return blocks.reshape(choices.shape)


def accuracy_predictor(path: Path) -> Callable[[IntArray], FloatArray]:
    """Return the published MLP as a function of choices (n, 45): ImageNet top-1 in per cent (n,)."""
    with np.load(path, allow_pickle=False) as file:
        layers = [
            (file[f"{i}_weight"].astype(np.float64), file[f"{i}_bias"].astype(np.float64))
            for i in (0, 2, 4, 6)
        ]

    def predict(choices: IntArray) -> FloatArray:
        hidden = features(choices)
        for weight, bias in layers[:-1]:
            hidden = np.maximum(hidden @ weight.T + bias, 0.0)
        weight, bias = layers[-1]
        accuracy: FloatArray = 100.0 * (hidden @ weight.T + bias)[:, 0]
        return accuracy

    return predict


def once_for_all(predictor: Path, lookup: Path, *, search_rounds: int = SEARCH_ROUNDS) -> Problem:
    """Return the problem of eight caps on latency; the loss is 100 minus the predicted top-1, without noise.

    search_rounds: how long :func:`long_search` looks for each optimum; 0 leaves the fallbacks' values.
    """
    with gzip.open(lookup, "rt") as file:
        rows = json.load(file)["tables"].get(str(RESOLUTION))
    if rows is None:
        raise ConfigError(
            f"{lookup}: no table for resolution {RESOLUTION}; expected once-for-all's of a Note 10"
        )
    table = latency_table({key: float(row[0]) for key, row in rows.items()})
    mask = tuple((True,) * size for size in NUM_CANDIDATES)
    fastest, slowest = table.minimum(mask), -table.scaled(0.0, -1.0).minimum(mask)
    caps = [fastest + share * (slowest - fastest) for share in np.linspace(*CAP_SHARES, NUM_CAPS)]
    objectives = tuple(Objective(tables={"latency": table}, caps={"latency": cap}) for cap in caps)
    accuracy = accuracy_predictor(predictor)

    def losses(choices: IntArray) -> FloatArray:
        return 100.0 - accuracy(choices)

    cheapest = np.array(table.cheapest(mask), dtype=np.int64)
    found = best_of_long_searches(objectives, losses, cheapest, rounds=search_rounds)
    return Problem(
        name="once-for-all",
        num_candidates=NUM_CANDIDATES,
        objectives=objectives,
        budgets=tuple(f"{cap:.1f} ms" for cap in caps),
        losses=losses,
        observe=lambda choices, visits, seed: losses(choices),
        optimum=found,
        fallback=np.tile(cheapest, (len(caps), 1)),
        exact=False,
    )


Losses = Callable[[IntArray], FloatArray]


POPULATION, NUM_CLIMBERS = 300, 10


def best_of_long_searches(
    objectives: Sequence[Objective], losses: Losses, start: IntArray, *, rounds: int
) -> FloatArray:
    """Return the least loss found under each of the caps (K,), which grow: what one cap admits, the next does."""
    known = start[None]
    best = np.empty(len(objectives))
    for k, objective in enumerate(objectives):
        if rounds:
            known = long_search(objective, losses, start, known=known, rounds=rounds)
        best[k] = losses(known[:1])[0]
    return best


def long_search(
    objective: Objective,
    losses: Losses,
    start: IntArray,
    *,
    known: IntArray,
    rounds: int,
    restarts: int = 8,
) -> IntArray:
    """Return the best feasible architectures (m, D), best first, that a search with the true losses found.

    Evolutions of ``rounds`` rounds from ``start`` (D,), each with its own seed, since this space has many
    local optima, and one more from what all of them and ``known`` (m, D) found.
    """
    ends = [evolved(objective, losses, start[None], seed=seed, rounds=rounds) for seed in range(restarts)]
    met = np.concatenate([known[:POPULATION], *(end[: POPULATION // 4] for end in ends)])
    return evolved(objective, losses, met, seed=restarts, rounds=rounds)


def evolved(
    objective: Objective, losses: Losses, population: IntArray, *, seed: int, rounds: int
) -> IntArray:
    """Return ``population`` (m, D) after ``rounds`` of crossing, mutation and the neighbours of the best few."""
    rng = np.random.default_rng(seed)
    mask = categorical.mask_array(NUM_CANDIDATES)
    known = _best_feasible(population, objective, losses)
    for _ in range(rounds):
        parents = known[rng.integers(len(known), size=(2, POPULATION))]  # (2, POPULATION, D)
        children = np.where(rng.random(parents.shape[1:]) < 0.5, parents[0], parents[1])
        other = rng.integers(0, NUM_CANDIDATES, size=children.shape)
        children = np.where(rng.random(children.shape) < 1.5 / len(mask), other, children)
        near = [categorical.neighbours(best, mask) for best in known[:NUM_CLIMBERS]]
        known = _best_feasible(np.concatenate([known, children, *near]), objective, losses)
        known = known[: max(POPULATION, len(population))]
    return known


def _best_feasible(choices: IntArray, objective: Objective, losses: Losses) -> IntArray:
    distinct = np.unique(canonical(choices), axis=0)
    feasible = distinct[objective.feasible(distinct)]
    return feasible[np.argsort(losses(feasible), kind="stable")]
