"""The gate alone, on a finished run: its networks against its files, in a later process."""

from __future__ import annotations

from pathlib import Path

from nasdeploy.errors import RunFolderError
from nasdeploy.exporters.verification import Verification, VerifyLimits, verify_export
from nasdeploy.networks import build_network
from nasdeploy.pipeline.context import prepare
from nasdeploy.pipeline.models import PARITY_IMAGES, parity_images
from nasdeploy.pipeline.selecting import stored_architecture
from nasdeploy.profiles import HardwareProfile
from nasdeploy.progress import Observer, Silent
from nasdeploy.runs import RunFolder, read_json
from nasdeploy.settings import BuildSettings


def verify_run(run_dir: str | Path, observer: Observer | None = None) -> dict[str, Verification]:
    """Return the checks of every exported file of a run against its network, rebuilt from its stored weights.

    Raises RunFolderError where there is no run, or its data has changed.
    """
    folder = RunFolder(Path(run_dir))
    stored = read_json(folder.run, schema="nasdeploy/run/1")
    job = prepare(
        BuildSettings.model_validate(stored["settings"]),
        folder=folder,
        observer=observer or Silent(),
        profiles=tuple(HardwareProfile.from_dict(data) for data in stored["profiles"].values()),
    )
    found = job.dataset.fingerprint()
    if found != stored["dataset"]["fingerprint"]:
        raise RunFolderError(
            f"{folder.run}: the data in {job.settings.data} has changed since the build "
            f"(fingerprint {found}, expected {stored['dataset']['fingerprint']})"
        )
    results = {}
    for profile in job.profiles:
        model = folder.model(profile.name)
        if not model.model.exists():
            raise RunFolderError(f"{model.model}: not found; nasdeploy build into the same folder makes it")
        network = build_network(job.space, stored_architecture(job, profile.name), job.normalise())
        network.load_state_dict(folder.load_tensors(model.weights))
        images = parity_images(job)
        results[profile.name] = verify_export(
            model.model,
            network.eval(),
            images,
            limits=VerifyLimits(min_images=min(PARITY_IMAGES, len(images))),
            opset=profile.runtime.opset,
        )
    return results
