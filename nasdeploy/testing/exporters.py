"""The contract of an exporter."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from nasdeploy.data import load_dataset
from nasdeploy.errors import ConfigError
from nasdeploy.exporters import Exporter
from nasdeploy.exporters.base import INPUT_NAME, OUTPUT_NAME
from nasdeploy.exporters.files import read_model
from nasdeploy.exporters.metadata import read_metadata
from nasdeploy.exporters.opsets import DEFAULT_OPSET, MIN_OPSET, supported_opset
from nasdeploy.exporters.runtime import OnnxClassifier
from nasdeploy.exporters.structure import model_opset
from nasdeploy.exporters.verification import VerifyLimits, verify_export
from nasdeploy.networks import Network
from nasdeploy.spaces import make_space
from nasdeploy.testing.common import check_global_generators, export, plain_network


class ExporterContract:
    """An exporter: implement :meth:`make`. It has to write a network of the space ``mobile``."""

    def make(self) -> Exporter:
        """Return the exporter."""
        raise NotImplementedError

    def test_it_writes_one_file_and_says_what_it_wrote(self, tmp_path: Path) -> None:
        exporter, path = self.make(), tmp_path / "model.onnx"
        told = export(exporter, _small_network(), path)
        assert [file.name for file in tmp_path.iterdir()] == [path.name], (
            "expected one file, and none beside it"
        )
        content, graph = path.read_bytes(), read_model(path).graph
        facts = (told.path, told.exporter, told.file_size, told.sha256, told.input_name, told.output_name)
        digest = hashlib.sha256(content).hexdigest()
        written = (path, exporter.name, len(content), digest, graph.input[0].name, graph.output[0].name)
        assert facts == written, f"told {facts}; written {written}"
        assert written[-2:] == (INPUT_NAME, OUTPUT_NAME), f"the file's input and output are {written[-2:]}"

    def test_the_same_network_gives_the_same_bytes(self, tmp_path: Path) -> None:
        digests = [
            export(self.make(), _small_network(), tmp_path / name).sha256 for name in ("a.onnx", "b.onnx")
        ]
        assert digests[0] == digests[1], "two exports of one network differ"

    def test_the_file_passes_the_gate(self, tmp_path: Path) -> None:
        network = _small_network()
        export(self.make(), network, tmp_path / "model.onnx")
        limits = VerifyLimits(min_images=64)
        found = verify_export(
            tmp_path / "model.onnx", network, _real_images(), limits=limits, opset=DEFAULT_OPSET
        )
        assert found.passed, "; ".join(check.describe() for check in found.failures)

    def test_the_network_is_left_as_it_was(self, tmp_path: Path) -> None:
        network = _small_network().train()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        check_global_generators(lambda: export(self.make(), network, tmp_path / "model.onnx"))
        assert network.training, "the network was switched to evaluation mode"
        changed = [
            name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])
        ]
        assert not changed, f"the network was changed: {changed}"

    def test_metadata_is_in_the_file(self, tmp_path: Path) -> None:
        export(self.make(), _small_network(), tmp_path / "model.onnx")
        found, given = read_metadata(tmp_path / "model.onnx"), {"seed": 3, "labels": ["höhe", "b"]}
        assert found == given, f"metadata {found}; expected {given}"

    def test_the_file_takes_the_batches_that_were_asked_for(self, tmp_path: Path) -> None:
        for batch_size in (None, 2):
            path = tmp_path / f"{batch_size}.onnx"
            export(self.make(), _small_network(), path, batch_size=batch_size)
            found = OnnxClassifier(path).fixed_batch
            assert found == batch_size, f"batch_size = {batch_size}: the file takes {found} (None: any)"

    def test_another_opset_is_written_or_refused(self, tmp_path: Path) -> None:
        opset = supported_opset()
        try:
            exported = export(self.make(), _small_network(), tmp_path / "model.onnx", opset=opset)
        except ConfigError:
            return
        found = (exported.opset, model_opset(read_model(exported.path)))
        assert found == (opset, opset), f"opset {opset} was asked for; told and written: {found}"

    def test_a_lower_opset_is_refused(self, tmp_path: Path) -> None:
        try:
            export(self.make(), _small_network(), tmp_path / "model.onnx", opset=MIN_OPSET - 1)
        except ConfigError:
            assert not list(tmp_path.iterdir()), "a file was written before the opset was refused"
        else:
            raise AssertionError(f"opset {MIN_OPSET - 1} was accepted; expected ConfigError")


def _real_images() -> Tensor:
    return load_dataset("fashion-mnist", seed=0).test.images[::20]


def _small_network() -> Network:
    """Return a small network with a residual block; its batch norms have the statistics of real images."""
    space = make_space("mobile", (1, 28, 28), 10)
    names = space.to_names(space.smallest()) | {"stage1.block2": "k3e2"}
    return plain_network(space, space.from_names(names), _real_images())
