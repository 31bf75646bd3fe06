"""A profile that joins a run after its search, against a search that had it from the start.

    python tests/benchmarks/later_profile.py [--seeds 5] [--steps 900]

Per seed: a search for the tightest and the roomiest default profile, then cpu-middle is added; and a search for all
three. All use one latency table. Times are those of whole calls of ``nasdeploy.search``: reading the data and the
tables, the search or the adaptation, and selection. Run it alone: a rival process makes training several times slower.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from statistics_of_pairs import interval

import nasdeploy
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.settings import BuildSettings, SearchSettings

ENDS = ("cpu-tight", "cpu-roomy")
LATER = "cpu-middle"
ALL = ("cpu-tight", "cpu-middle", "cpu-roomy")


def timed_search(settings: BuildSettings, folder: Path) -> float:
    """Search; return the seconds."""
    started = time.perf_counter()
    nasdeploy.search(settings, output_dir=folder)
    return time.perf_counter() - started


def loss_of(folder: Path) -> float:
    """Return the validation loss of the architecture of the later profile, with the shared weights."""
    stored = read_json(RunFolder(folder).model(LATER).architecture)
    return float(stored["validation"]["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--data", default="fashion-mnist")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tables = BuildSettings(data=arguments.data, profiles=ALL, search=SearchSettings(num_steps=10))
        nasdeploy.search(tables, output_dir=root / "tables")
        print("seed  first search  later profile  ratio   loss later  loss from the start  difference")
        ratios, losses, differences = [], [], []
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):

            def settings(profiles: tuple[str, ...], seed: int = seed) -> BuildSettings:
                return BuildSettings(
                    data=arguments.data,
                    seed=seed,
                    profiles=profiles,
                    latency_from=str(root / "tables"),
                    search=SearchSettings(num_steps=arguments.steps),
                )

            first = timed_search(settings(ENDS), root / f"ends{seed}")
            later = timed_search(settings((LATER,)), root / f"ends{seed}")
            timed_search(settings(ALL), root / f"all{seed}")
            found, expected = loss_of(root / f"ends{seed}"), loss_of(root / f"all{seed}")
            ratios.append(later / first)
            losses.append(expected)
            differences.append(found - expected)
            print(
                f"{seed:4}  {first:10.1f} s  {later:11.1f} s  {later / first:5.3f}  {found:10.4f}  {expected:19.4f}  "
                f"{found - expected:+10.4f}",
                flush=True,
            )
    spread = statistics.stdev(losses)
    print(f"ratio of times: mean {statistics.fmean(ratios):.3f}, largest {max(ratios):.3f}")
    print(
        f"difference of losses: {interval(differences)}; a search's own spread over seeds (s.d.): {spread:.4f}"
    )


if __name__ == "__main__":
    main()
