"""A training step of the supernet against the same stand-alone network's: python tests/benchmarks/supernet_step.py

Both run in turns in one process; the ratio is that of the medians. Goal: at most 1.05.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nasdeploy.networks import Normalise, Supernet
from nasdeploy.spaces import Architecture, make_space
from nasdeploy.training.memory import keep_freed_memory
from nasdeploy.training.precision import resolve_device
from nasdeploy.training.schedules import make_optimizer


def _stepper(
    module: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
) -> Callable[[], float]:
    optimizer = make_optimizer(module, weight_decay=5e-4)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(forward(images), labels).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--random", type=int, default=3, help="random architectures beside smallest and largest"
    )
    arguments = parser.parse_args()
    keep_freed_memory()
    device = resolve_device(arguments.device)
    space = make_space("mobile", (1, 28, 28), 10)
    supernet = Supernet(space, Normalise((73.0,), (90.0,)), torch.Generator().manual_seed(0)).to(device)
    supernet = supernet.to(memory_format=torch.channels_last)
    rng = np.random.default_rng(0)
    chosen = {"smallest": space.smallest(), "largest": space.largest()}
    for i in range(arguments.random):
        chosen[f"random {i}"] = Architecture(tuple(int(rng.integers(c)) for c in space.num_candidates()))
    images = 255 * torch.rand(arguments.batch_size, 1, 28, 28, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (arguments.batch_size,), device=device)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {device}, "
        f"{torch.get_num_threads()} threads, batch {arguments.batch_size}, {arguments.steps} steps each"
    )
    for name, architecture in chosen.items():
        network = supernet.extract(architecture).to(memory_format=torch.channels_last).train()
        alone = _stepper(network, network, images, labels)
        shared = _stepper(supernet, lambda x, a=architecture: supernet(x, a), images, labels)
        times: dict[str, list[float]] = {"alone": [], "shared": []}
        for _ in range(arguments.steps):
            times["alone"].append(alone())
            times["shared"].append(shared())
        median = {kind: statistics.median(values[5:]) for kind, values in times.items()}
        print(
            f"{name:10s} alone {1e3 * median['alone']:7.2f} ms  supernet {1e3 * median['shared']:7.2f} ms  "
            f"ratio {median['shared'] / median['alone']:.3f}"
        )


if __name__ == "__main__":
    main()
