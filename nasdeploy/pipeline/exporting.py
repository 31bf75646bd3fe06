"""``nasdeploy export``: the networks of a finished run as files again, in other formats; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nasdeploy.costs.comparison import QUICK, BenchProtocol
from nasdeploy.errors import ConfigError, RunFolderError
from nasdeploy.exporters import make_exporter
from nasdeploy.exporters.opsets import check_opset
from nasdeploy.exporters.quantization import PRECISIONS
from nasdeploy.pipeline.context import Job, finished_job, torch_environment
from nasdeploy.pipeline.export_results import ExportOptions, ExportResult, MeasuredLatency, ProfileExport
from nasdeploy.pipeline.reexporting import ProfileExporter
from nasdeploy.profiles import HardwareProfile, load_profile
from nasdeploy.progress import Observer, Silent

__all__ = ["PRECISIONS", "ExportResult", "MeasuredLatency", "ProfileExport", "export_run"]


def export_run(
    run_dir: str | Path,
    *,
    profiles: Sequence[str] | None = None,
    precision: str = "fp32",
    opset: int | None = None,
    exporter: str | None = None,
    batch_size: int | None = None,
    dynamic_batch: bool = False,
    max_accuracy_drop: float | None = None,
    protocol: BenchProtocol = QUICK,
    output_dir: str | Path | None = None,
    observer: Observer | None = None,
) -> ExportResult:
    """Export the trained networks of a run again; the run's own files stay as they are.

    profiles: names; None: all that are trained. opset, exporter, batch_size: those of the run where None.
    max_accuracy_drop: of fp16 and int8 files on validation images, in [0, 1]; None: that of the profile where it is for
    this precision, else 0.005 and 0.01. protocol: how long latency is measured. output_dir: ``exports/`` in the run
    folder where None. Each file ``<profile>.<precision>.onnx`` has a JSON file beside it; a file that fails a check is
    not written, and the JSON file says why. Raises ConfigError for wrong arguments, and RunFolderError where there is
    no run, nothing is trained, or the data has changed.
    """
    options = ExportOptions(
        precision=precision,
        opset=opset,
        exporter=exporter,
        batch_size=batch_size,
        dynamic_batch=dynamic_batch,
        max_accuracy_drop=max_accuracy_drop,
        protocol=protocol,
    )
    _check(options)
    job = finished_job(run_dir, observer or Silent())
    target = Path(output_dir) if output_dir is not None else job.folder.exports
    chosen = _chosen_profiles(job, profiles)
    _make_folder(target)
    with torch_environment(job):
        exports = tuple(ProfileExporter(job, profile, options, target).carry_out() for profile in chosen)
    return ExportResult(run_dir=job.folder.path, output_dir=target, exports=exports)


def _check(options: ExportOptions) -> None:
    """Raise ConfigError for options that are wrong whatever the run is."""
    if options.precision not in PRECISIONS:
        raise ConfigError(f"precision = '{options.precision}': expected one of {', '.join(PRECISIONS)}")
    if options.opset is not None:
        check_opset(options.opset)
    if options.exporter is not None:
        make_exporter(options.exporter)
    size, drop = options.batch_size, options.max_accuracy_drop
    if size is not None and (size < 1 or options.dynamic_batch):
        raise ConfigError(f"batch_size = {size}: expected 1 or more, and not together with a dynamic batch")
    if drop is not None and (options.precision == "fp32" or not 0.0 <= drop <= 1.0):
        raise ConfigError(
            f"max_accuracy_drop = {drop}: expected 0 to 1, and precision = 'fp16' or 'int8': an fp32 file must compute "
            "what its network computes"
        )


def _chosen_profiles(job: Job, names: Sequence[str] | None) -> list[HardwareProfile]:
    """Return the profiles to export. Raises RunFolderError for one that the run does not have or has not trained."""
    known = {profile.name: profile for profile in job.profiles}
    trained = [name for name in known if _is_trained(job, name)]
    if names is None:
        for name in [name for name in known if name not in trained]:
            job.observer.note(f"{name}: is not trained in {job.folder.path}; left out")
        names = trained
    chosen = list(
        dict.fromkeys(load_profile(name).name if name.endswith(".toml") else name for name in names)
    )
    for name in chosen:
        if name not in known:
            raise RunFolderError(
                f"--profile {name}: is not in {job.folder.path}; expected one of {', '.join(known)}"
            )
    missing = [name for name in chosen if name not in trained]
    if missing or not chosen:
        raise RunFolderError(
            f"{job.folder.path}: {', '.join(missing or known)}: not trained yet; nasdeploy build into the same folder "
            "finishes it"
        )
    return [known[name] for name in chosen]


def _is_trained(job: Job, name: str) -> bool:
    folder = job.folder.model(name)
    return all(file.exists() for file in (folder.architecture, folder.training, folder.weights))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"--output-dir {path}: cannot be made ({error.strerror}); expected a folder that can be written"
        ) from error
