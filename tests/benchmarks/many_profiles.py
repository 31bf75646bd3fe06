"""What more profiles cost: one search for eight of them, against eight searches for one each.

    python tests/benchmarks/many_profiles.py [--seeds 5] [--steps 900]

The profiles differ in their cap on latency, from 12 % to 90 % of the way from the smallest to the largest network. All
searches have the same number of steps and one latency table. Losses are those of the selected architectures on the
whole validation split, with shared weights and recalibrated batch norms; each is from another supernet. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from statistics_of_pairs import interval

import nasdeploy
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.settings import BuildSettings, SearchSettings

PERCENTS = (12, 20, 30, 40, 50, 60, 75, 90)


def write_profiles(folder: Path) -> tuple[str, ...]:
    """Write the eight profiles; return their paths."""
    paths = []
    for percent in PERCENTS:
        path = folder / f"p{percent}.toml"
        path.write_text(
            f'name = "p{percent}"\n[runtime]\nthreads = 1\n[budget]\nlatency = {{ max = "{percent}%" }}\n'
        )
        paths.append(str(path))
    return tuple(paths)


class Search:
    """One finished search: seconds of its loop, of its selection and of the whole call, and losses by profile."""

    def __init__(self, settings: BuildSettings, folder: Path) -> None:
        started = time.perf_counter()
        nasdeploy.search(settings, output_dir=folder)
        self.call = time.perf_counter() - started
        run = RunFolder(folder)
        self.loop = float(read_json(run.search_result)["seconds"])
        events = [json.loads(line) for line in run.events.read_text().splitlines()]
        times = {event["event"]: event["time"] for event in events if event.get("phase") == "select"}
        self.select = float(times["finish"] - times["start"])
        self.losses = {
            name: float(read_json(run.model(name).architecture)["validation"]["loss"])
            for name in read_json(run.run)["profiles"]
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--data", default="fashion-mnist")
    arguments = parser.parse_args()
    loops, calls, differences = [], [], []
    by_profile: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        profiles = write_profiles(root)
        base = BuildSettings(data=arguments.data, profiles=profiles, search=SearchSettings(num_steps=10))
        nasdeploy.search(base, output_dir=root / "tables")
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            settings = base.model_copy(
                update={
                    "seed": seed,
                    "latency_from": str(root / "tables"),
                    "search": SearchSettings(num_steps=arguments.steps),
                }
            )
            joint = Search(settings, root / f"joint{seed}")
            own = [
                Search(settings.model_copy(update={"profiles": (path,)}), root / f"{Path(path).stem}-{seed}")
                for path in profiles
            ]
            loops.append(joint.loop / statistics.fmean(one.loop for one in own))
            calls.append(joint.call / statistics.fmean(one.call for one in own))
            pairs = {name: joint.losses[name] - loss for one in own for name, loss in one.losses.items()}
            for profile, difference in pairs.items():
                by_profile.setdefault(profile, []).append(difference)
            differences.append(statistics.fmean(pairs.values()))
            loop, select = (
                statistics.fmean(getattr(one, part) for one in own) for part in ("loop", "select")
            )
            print(
                f"seed {seed}: search loop {joint.loop:.1f} s for eight, {loop:.1f} s for one ({loops[-1]:.3f}); "
                f"selection {joint.select:.1f} s and {select:.1f} s; whole calls {calls[-1]:.3f}; "
                f"loss, joint minus own, mean of eight {differences[-1]:+.4f}",
                flush=True,
            )
    for profile, values in by_profile.items():
        print(f"{profile}: loss, joint minus own {interval(values)}")
    print(f"time of the search loop, eight over one: {interval(loops)}")
    print(f"time of the whole call, eight over one: {interval(calls)}")
    print(f"loss, joint minus own: {interval(differences)}")


if __name__ == "__main__":
    main()
