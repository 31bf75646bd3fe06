"""Exporters: the file computes what the network computes, is clean, and is the same bytes every time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from nasdeploy.errors import ConfigError, UsageError
from nasdeploy.exporters import ExportedModel, exporter_names, make_exporter
from nasdeploy.exporters.files import documentation, read_model, strip_model
from nasdeploy.exporters.graph import folded_weights
from nasdeploy.exporters.metadata import architecture_hash, model_metadata, read_metadata
from nasdeploy.exporters.opsets import check_opset, supported_opset
from nasdeploy.exporters.runtime import OnnxClassifier
from nasdeploy.files import write_whole
from nasdeploy.networks import Network, Normalise, build_network
from nasdeploy.networks.operations import ConvNorm
from nasdeploy.spaces import Architecture, SearchSpace, make_space

SHAPE = (3, 28, 28)
METADATA = {"nasdeploy.seed": "3", "nasdeploy.labels": '["höhe", "b"]'}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another make tiny networks many times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _space() -> SearchSpace:
    return make_space("mobile", SHAPE, 7)


def _network(architecture: Architecture, seed: int = 0, space: SearchSpace | None = None) -> Network:
    """Return a network whose batch norm has statistics far from the initial 0 and 1."""
    rng = torch.Generator().manual_seed(seed)
    normalise = Normalise((120.0, 90.0, 60.0), (50.0, 60.0, 70.0))
    network = build_network(space or _space(), architecture, normalise, rng)
    with torch.no_grad():
        for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
            for tensor in (norm.weight, norm.running_var):
                assert tensor is not None
                tensor.uniform_(0.4, 2.0, generator=rng)
            for tensor in (norm.bias, norm.running_mean):
                assert tensor is not None
                tensor.normal_(0.0, 0.3, generator=rng)
    return network.eval()


def _random_architecture(seed: int) -> Architecture:
    rng = np.random.default_rng(seed)
    return Architecture(tuple(int(rng.integers(count)) for count in _space().num_candidates()))


def _images(count: int, image_shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *image_shape), np.uint8)


def _export(
    network: nn.Module,
    path: Path,
    *,
    exporter: str = "graph",
    batch_size: int | None = None,
    opset: int = 18,
    image_shape: tuple[int, int, int] = SHAPE,
) -> ExportedModel:
    return make_exporter(exporter).export(
        network, image_shape=image_shape, path=path, opset=opset, batch_size=batch_size, metadata=METADATA
    )


def _difference(network: nn.Module, path: Path, image_shape: tuple[int, int, int] = SHAPE) -> float:
    """Return the largest difference between file and network, relative to the range of the outputs."""
    images = _images(5, image_shape)
    with torch.no_grad():
        expected = network(torch.from_numpy(images).float()).numpy()
    return float(np.abs(OnnxClassifier(path).logits(images, 3) - expected).max() / np.ptp(expected))


@pytest.mark.parametrize("seed", range(6))
def test_graph_exporter_computes_what_the_network_computes(seed: int, tmp_path: Path) -> None:
    network = _network(_random_architecture(seed), seed)
    batch_size = (None, 1, 2)[seed % 3]
    _export(network, tmp_path / "m.onnx", batch_size=batch_size)
    assert _difference(network, tmp_path / "m.onnx") < 1e-5
    assert OnnxClassifier(tmp_path / "m.onnx").fixed_batch == batch_size


@pytest.mark.parametrize("opset", [18, supported_opset()])
def test_graph_exporter_writes_the_opset_that_was_asked_for(opset: int, tmp_path: Path) -> None:
    exported = _export(_network(_space().smallest()), tmp_path / "m.onnx", opset=opset)
    assert [entry.version for entry in read_model(exported.path).opset_import] == [exported.opset] == [opset]


def test_torch_exporter_writes_the_same_function_clean(tmp_path: Path) -> None:
    network = _network(_space().smallest()).train()
    exported = _export(network, tmp_path / "m.onnx", exporter="torch")
    assert network.training  # the caller's network is left as it was
    assert _difference(network.eval(), exported.path) < 1e-5
    model = read_model(exported.path)
    assert dict(documentation(model)) == {f"Model, {key}": value for key, value in METADATA.items()}
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert (model.graph.input[0].name, model.graph.output[0].name) == ("images", "logits")
    assert os.getcwd().encode() not in exported.path.read_bytes()
    assert exported.sha256 == _export(network, tmp_path / "again.onnx", exporter="torch").sha256


def test_torch_exporter_takes_other_modules_and_graph_exporter_says_so(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 26 * 26, 2)
    ).eval()
    _export(module, tmp_path / "m.onnx", exporter="torch", batch_size=1)
    assert _difference(module, tmp_path / "m.onnx") < 1e-5
    with pytest.raises(ConfigError, match=r"cannot write a Sequential; .* exporter 'torch' takes others"):
        _export(module, tmp_path / "n.onnx")


def test_folding_is_the_affine_map_of_batch_norm() -> None:
    layer = ConvNorm(2, 3, kernel=3).eval()
    with torch.no_grad():
        layer[1].running_mean.copy_(torch.tensor([1.0, -2.0, 3.0]))
        layer[1].running_var.copy_(torch.tensor([4.0, 9.0, 0.25]) - layer[1].eps)
        layer[1].weight.copy_(torch.tensor([2.0, 3.0, 0.5]))
        layer[1].bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    folded = folded_weights("stem", layer)
    np.testing.assert_allclose(folded["weight"], layer[0].weight.detach(), rtol=1e-6)  # γ/σ = 1
    np.testing.assert_allclose(folded["bias"], [-1.0, 3.0, -4.0], rtol=1e-6)


def test_an_unknown_layer_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"head: exporter 'graph' cannot write a Linear; .* ConvNorm"):
        folded_weights("head", nn.Linear(1, 1))


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image_shape = \(1, 28, 28\): the network takes \(3, 28, 28\)"):
        _export(_network(_space().smallest()), tmp_path / "m.onnx", image_shape=(1, 28, 28))


@pytest.mark.parametrize("exporter", ["graph", "torch"])
def test_a_network_is_exported_for_images_of_its_own_resolution(exporter: str, tmp_path: Path) -> None:
    space = make_space("mobile", (3, 128, 128), 7, (96, 128))
    network = _network(space.smallest(), space=space)
    with pytest.raises(ConfigError, match=r"image_shape = \(3, 128, 128\): the network takes \(3, 96, 96\)"):
        _export(network, tmp_path / "m.onnx", exporter=exporter, image_shape=space.image_shape)
    shape = space.input_shape(space.smallest())
    _export(network, tmp_path / "m.onnx", exporter=exporter, image_shape=shape)
    assert OnnxClassifier(tmp_path / "m.onnx").input_shape == (None, 3, 96, 96)
    assert _difference(network, tmp_path / "m.onnx", shape) < 1e-5


@pytest.mark.parametrize("size", [64, 160, 224])
def test_graph_exporter_writes_networks_for_larger_images(size: int, tmp_path: Path) -> None:
    space = make_space("mobile", (3, size, size), 7)
    choices = np.random.default_rng(size).integers(space.num_candidates())
    network = _network(Architecture(tuple(map(int, choices))), space=space)
    _export(network, tmp_path / "m.onnx", image_shape=space.image_shape)
    assert _difference(network, tmp_path / "m.onnx", space.image_shape) < 1e-5


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    first = _export(_network(_space().smallest()), tmp_path / "a.onnx")
    second = _export(_network(_space().smallest()), tmp_path / "b.onnx")
    content = first.path.read_bytes()
    assert content == second.path.read_bytes()
    assert (first.sha256, first.file_size) == (hashlib.sha256(content).hexdigest(), len(content))


SECOND_PROCESS = """
import sys
from pathlib import Path
from nasdeploy.exporters import make_exporter
from nasdeploy.networks import Normalise, build_network
from nasdeploy.spaces import make_space
from safetensors.torch import load_file
space = make_space("mobile", (1, 28, 28), 3)
network = build_network(space, space.smallest(), Normalise((70.0,), (80.0,)))
network.load_state_dict(load_file(sys.argv[1] + ".safetensors"))
exported = make_exporter("graph").export(
    network,
    image_shape=(1, 28, 28),
    path=Path(sys.argv[1]),
    opset=18,
    batch_size=1,
    metadata={"b": "2", "a": "1"},
)
print(exported.sha256)
"""


def test_a_second_process_gives_the_same_bytes(tmp_path: Path) -> None:
    space = make_space("mobile", (1, 28, 28), 3)
    network = build_network(space, space.smallest(), Normalise((70.0,), (80.0,)))
    here = make_exporter("graph").export(
        network,
        image_shape=(1, 28, 28),
        path=tmp_path / "a.onnx",
        opset=18,
        batch_size=1,
        metadata={"a": "1", "b": "2"},
    )
    save_file(network.state_dict(), tmp_path / "b.onnx.safetensors")
    there = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, str(tmp_path / "b.onnx")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert there.stdout.strip() == here.sha256


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_whole(tmp_path / "taken", b"content")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]  # no temporary file is left
    write_whole(tmp_path / "new" / "file", b"one")
    write_whole(tmp_path / "new" / "file", b"two")
    assert (tmp_path / "new" / "file").read_bytes() == b"two"


def test_stripping_reaches_subgraphs_and_unused_operator_sets() -> None:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    inner = helper.make_node("Identity", ["x"], ["y"], doc_string='File "/home/a/b.py", line 3')
    branch = helper.make_graph([inner], "branch", [], [value], doc_string="branch")
    outer = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([outer], "g", [], [value], doc_string="graph")
    opsets = [helper.make_opsetid(domain, 1) for domain in ("", "com.example")]
    model = helper.make_model(graph, opset_imports=opsets, doc_string="model")
    assert len(list(documentation(model))) == 6
    strip_model(model)
    assert list(documentation(model)) == []
    assert [entry.domain for entry in model.opset_import] == [""]


@pytest.mark.parametrize("opset", [11, 17])
def test_a_low_opset_is_refused_with_the_reason(opset: int) -> None:
    with pytest.raises(ConfigError, match=f"opset = {opset}: expected 18 or more, because torch's exporter"):
        check_opset(opset)


def test_an_opset_beyond_the_installed_runtime_is_refused() -> None:
    highest = supported_opset()
    check_opset(highest)
    with pytest.raises(ConfigError, match=f"expected 18 to {highest}; the installed onnx .* onnxruntime"):
        check_opset(highest + 1)
    assert highest <= onnx.defs.onnx_opset_version()


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution with entry points that a test writes."""
    folder = tmp_path / "plug_in-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-in\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder / "entry_points.txt"


def test_an_exporter_comes_by_entry_point(plug_in: Path) -> None:
    plug_in.write_text("[nasdeploy.exporters]\nmine = nasdeploy.exporters.graph:GraphExporter\n")
    assert exporter_names() == ["graph", "torch", "mine"]
    assert make_exporter("mine").name == "graph"


def test_a_name_taken_twice_shows_both(plug_in: Path) -> None:
    plug_in.write_text("[nasdeploy.exporters]\ngraph = elsewhere:Exporter\n")
    with pytest.raises(
        ConfigError, match=r"'graph' is defined twice: by nasdeploy itself and by elsewhere:Exporter"
    ):
        make_exporter("torch")


def test_an_unknown_exporter_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="exporter: 'tflite' is not known; expected one of graph, torch"):
        make_exporter("tflite")


def test_importing_the_package_is_light() -> None:
    code = "import nasdeploy.exporters, sys; assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_metadata_survives_the_file(tmp_path: Path) -> None:
    space = _space()
    names = space.to_names(space.smallest())
    metadata = model_metadata(
        profile="cpu-tight",
        precision="fp32",
        budget={"latency": {"max": "40%"}},
        space=space.name,
        architecture=names,
        dataset="0123",
        seed=5,
        versions={"torch": "2"},
        image_shape=SHAPE,
        preprocessing={"resize": 28},
        mean=(1.0, 2.0, 3.0),
        std=(4.0, 5.0, 6.0),
        labels=("höhe", "b"),
    )
    make_exporter("graph").export(
        _network(space.smallest()),
        image_shape=SHAPE,
        path=tmp_path / "m.onnx",
        opset=18,
        batch_size=1,
        metadata=metadata,
    )
    got = read_metadata(tmp_path / "m.onnx")
    assert len(got) == len(metadata)
    assert (got["architecture"], got["labels"], got["seed"]) == (names, ["höhe", "b"], 5)
    assert got["architecture_hash"] == architecture_hash("mobile", names) != architecture_hash("other", names)
    assert got["input"]["shape"] == [3, 28, 28]


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    make_exporter("graph").export(
        _network(_space().smallest()),
        image_shape=SHAPE,
        path=tmp_path / "m.onnx",
        opset=18,
        batch_size=1,
        metadata={"nasdeploy.seed": "five", "author": "not JSON, not ours"},
    )
    with pytest.raises(UsageError, match=r"m\.onnx: its metadata under 'nasdeploy\.' is not JSON"):
        read_metadata(tmp_path / "m.onnx")
