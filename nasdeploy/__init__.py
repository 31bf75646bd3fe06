"""One architecture search, one certified ONNX file per device.

The public surface. Every name is looked up on first use, so that ``import nasdeploy`` alone loads neither
torch nor any other library. No name here may also be that of a sub-module, since Python overwrites it when
that module is imported.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nasdeploy.errors import NasdeployError
    from nasdeploy.pipeline import (
        BuildResult,
        BuildSettings,
        MeasureResult,
        SearchResult,
        bench,
        build,
        check_profile,
        export_run,
        import_bench,
        import_result,
        measure,
        pack_bench,
        pack_table,
        plan,
        report,
        search,
        verify_run,
    )
    from nasdeploy.profiles import HardwareProfile, load_profile
    from nasdeploy.spaces import Architecture, SearchSpace, make_space

__all__ = [
    "Architecture",
    "BuildResult",
    "BuildSettings",
    "HardwareProfile",
    "MeasureResult",
    "NasdeployError",
    "SearchResult",
    "SearchSpace",
    "__version__",
    "bench",
    "build",
    "check_profile",
    "export_run",
    "import_bench",
    "import_result",
    "load_profile",
    "make_space",
    "measure",
    "pack_bench",
    "pack_table",
    "plan",
    "report",
    "search",
    "verify_run",
]

__version__: str

# ONNX Runtime reports to its makers, unless this is set before it is imported; nasdeploy opens no connection.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Architecture": "nasdeploy.spaces",
    "BuildResult": "nasdeploy.pipeline",
    "BuildSettings": "nasdeploy.pipeline",
    "HardwareProfile": "nasdeploy.profiles",
    "MeasureResult": "nasdeploy.pipeline",
    "NasdeployError": "nasdeploy.errors",
    "SearchResult": "nasdeploy.pipeline",
    "SearchSpace": "nasdeploy.spaces",
    "bench": "nasdeploy.pipeline",
    "build": "nasdeploy.pipeline",
    "check_profile": "nasdeploy.pipeline",
    "export_run": "nasdeploy.pipeline",
    "import_bench": "nasdeploy.pipeline",
    "import_result": "nasdeploy.pipeline",
    "pack_bench": "nasdeploy.pipeline",
    "pack_table": "nasdeploy.pipeline",
    "load_profile": "nasdeploy.profiles",
    "make_space": "nasdeploy.spaces",
    "measure": "nasdeploy.pipeline",
    "plan": "nasdeploy.pipeline",
    "report": "nasdeploy.pipeline",
    "search": "nasdeploy.pipeline",
    "verify_run": "nasdeploy.pipeline",
}


def _read_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nasdeploy")
    except PackageNotFoundError:
        return _checkout_version()


def _checkout_version() -> str:
    """Return the version in the pyproject.toml beside the package: this checkout was never installed."""
    import tomllib
    from pathlib import Path

    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if not pyproject.is_file():
        return "0+unknown"
    return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])


# Hidden from type checkers: they would take every misspelt name for an object that exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name == "__version__":
            value = _read_version()
        elif name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module 'nasdeploy' has no attribute '{name}'")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
