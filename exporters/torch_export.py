"""The exporter for any module: ``torch.onnx.export``. Slower, but it knows nearly every operator of torch."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from torch import nn

from nasdeploy.costs.graphs import check_image_shape
from nasdeploy.errors import ConfigError
from nasdeploy.exporters.base import INPUT_NAME, OUTPUT_NAME, ExportedModel
from nasdeploy.exporters.files import save_model
from nasdeploy.exporters.opsets import check_opset
from nasdeploy.networks.network import Network


class TorchExporter:
    """Writes any module that maps (B, C, s, s) to (B, num_classes) and that torch can trace."""

    @property
    def name(self) -> str:
        """See :class:`~nasdeploy.exporters.base.Exporter`."""
        return "torch"

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
        """See :class:`~nasdeploy.exporters.base.Exporter`."""
        check_opset(opset)
        if isinstance(network, Network):  # it would compute something for images of any size
            check_image_shape(image_shape, next(iter(network.specs.values())))
        with _silent_exporter():
            model = _export(network, image_shape=image_shape, opset=opset, batch_size=batch_size)
        written = {entry.domain: entry.version for entry in model.opset_import}.get("")
        if written != opset:  # the exporter falls back to the opset that it wrote first, and only logs it
            raise ConfigError(
                f"opset = {opset}: torch's exporter wrote {written}; expected opset = {written}"
            )
        return save_model(model, path=path, opset=opset, exporter=self.name, metadata=metadata)


def _export(
    network: nn.Module, *, image_shape: tuple[int, int, int], opset: int, batch_size: int | None
) -> onnx.ModelProto:
    # A copy: the caller's network keeps its device and its mode.
    module = copy.deepcopy(network).cpu().eval()
    # Traced with one image, a dynamic batch would be taken for a constant.
    images = torch.zeros(2 if batch_size is None else batch_size, *image_shape)
    try:
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            external_data=False,
            verbose=False,
            opset_version=opset,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim("batch")},) if batch_size is None else None,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"exporter 'torch' cannot write this {type(network).__name__}: {reason}") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """Silence what the exporter says about its own internals: a user of nasdeploy can do nothing about it.

    Only warnings that are raised in those libraries, and only their loggers below an error.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            # copyreg: torch's exporter pickles its deprecated tree specifications through it.
            warnings.filterwarnings(
                "ignore", category=category, module=r"(torch|onnxscript|onnx_ir|copyreg)(\.|$)"
            )
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
