"""From a trained network to one ONNX file, and the gate that the file must pass.

Importing this package loads neither torch nor onnx: exporters and checks are imported when they are used.
"""

from __future__ import annotations

from nasdeploy.exporters.base import EXPORTERS, ExportedModel, Exporter, exporter_names, make_exporter

__all__ = ["EXPORTERS", "ExportedModel", "Exporter", "exporter_names", "make_exporter"]
