"""What an exporter is, and which there are: the dict literal below, and others by file or entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from nasdeploy.errors import ConfigError
from nasdeploy.plugins import call_plugin, entry_points_of, find_plugin

if TYPE_CHECKING:
    from torch import nn

INPUT_NAME, OUTPUT_NAME = "images", "logits"
ENTRY_POINT_GROUP = "nasdeploy.exporters"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedModel:
    """One written file. file_size: bytes. sha256: of the whole file, hexadecimal."""

    path: Path
    opset: int
    exporter: str
    file_size: int
    sha256: str
    input_name: str = INPUT_NAME
    output_name: str = OUTPUT_NAME


class Exporter(Protocol):
    """Writes a trained network as one ONNX file; the same arguments give the same bytes.

    The file takes "images", float32 (B, C, s, s), pixels 0..255, and gives "logits", float32
    (B, num_classes). It computes what the network computes in evaluation mode; the network itself is left
    as it is.
    """

    @property
    def name(self) -> str:
        """The name that :func:`make_exporter` knows it by."""
        ...

    def export(
        self,
        network: nn.Module,
        *,
        image_shape: tuple[int, int, int],
        path: Path,
        opset: int,
        batch_size: int | None,
        metadata: Mapping[str, str],
    ) -> ExportedModel:
        """Write ``network`` for images of ``image_shape`` (C, s, s) to ``path``, whole or not at all.

        ``batch_size`` None: any batch size. ``metadata`` becomes the metadata of the model
        (:func:`nasdeploy.exporters.metadata.model_metadata`). Raises ConfigError for an opset that cannot be
        written and for a network that this exporter cannot handle.
        """
        ...


ExporterFactory = Callable[[], Exporter]


def _graph_exporter() -> Exporter:
    from nasdeploy.exporters.graph import GraphExporter

    return GraphExporter()


def _torch_exporter() -> Exporter:
    from nasdeploy.exporters.torch_export import TorchExporter

    return TorchExporter()


EXPORTERS: dict[str, ExporterFactory] = {
    "graph": _graph_exporter,
    "torch": _torch_exporter,
}


def exporter_names() -> list[str]:
    """Return the names that :func:`make_exporter` knows. Raises ConfigError where two share a name."""
    return [*EXPORTERS, *_plugins()]


def _plugins() -> dict[str, EntryPoint]:
    return entry_points_of(ENTRY_POINT_GROUP, builtin_names=EXPORTERS, what="exporter")


def make_exporter(name: str) -> Exporter:
    """Return the exporter called ``name``: built in, a plug-in's, or a class in a file ("my_exporter.py:Exporter").

    Raises ConfigError for an unknown or doubly defined name, and for what is no exporter.
    """
    plugins = _plugins()
    if name in EXPORTERS:
        return EXPORTERS[name]()
    factory = find_plugin(name, plugins, builtin_names=EXPORTERS, what="exporter")
    exporter = call_plugin(factory, what="exporter", source=name)
    if not callable(getattr(exporter, "export", None)) or not isinstance(
        getattr(exporter, "name", None), str
    ):
        raise ConfigError(
            f"exporter: {name} gives a {type(exporter).__name__}; expected an object with a name and a method export, "
            "as in nasdeploy.exporters.Exporter"
        )
    return cast(Exporter, exporter)
