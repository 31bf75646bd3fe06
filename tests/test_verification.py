"""The export gate: it passes a good file, and each check fails when what it guards is broken on purpose."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from jsonschema import Draft202012Validator
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from nasdeploy.errors import GateError, UsageError
from nasdeploy.exporters import make_exporter
from nasdeploy.exporters.files import read_model
from nasdeploy.exporters.runtime import OnnxClassifier
from nasdeploy.exporters.structure import MACHINE_PATH
from nasdeploy.exporters.verification import (
    Check,
    VerifyLimits,
    inspect_model,
    onnx_accuracy,
    onnx_predictions,
    runs_alone,
    verify_export,
    verify_file,
)
from nasdeploy.files import write_whole
from nasdeploy.networks import Network, Normalise, build_network
from nasdeploy.schemas import load_schema
from nasdeploy.spaces import make_space

SHAPE = (1, 28, 28)
FEW = VerifyLimits(min_images=32)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another make tiny networks many times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def network() -> Network:
    """A network whose outputs depend on the images (batch norm recalibrated on them, a wide classifier)."""
    space = make_space("mobile", SHAPE, 4)
    network = build_network(space, space.smallest(), Normalise((128.0,), (60.0,)))
    nn.init.normal_(
        network.get_parameter("layers.classifier.linear.weight"), generator=torch.Generator().manual_seed(1)
    )
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0  # one batch sets the statistics
    with torch.no_grad():
        network.train()(torch.from_numpy(_images(64)).float())
    return network.eval()


@pytest.fixture(scope="module")
def exported(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(network, tmp_path_factory.mktemp("models") / "model.onnx")


def _export(network: Network, path: Path, batch_size: int | None = None) -> Path:
    make_exporter("graph").export(
        network,
        image_shape=SHAPE,
        path=path,
        opset=18,
        batch_size=batch_size,
        metadata={"nasdeploy.seed": "1"},
    )
    return path


def _images(count: int) -> np.ndarray:
    """Return images with structure at several scales, so that they differ after pooling."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (count, 1, 7, 7)).repeat(4, axis=2).repeat(4, axis=3)
    return np.clip(blocks * rng.uniform(0.1, 1.0, (count, 1, 1, 1)), 0, 255).astype(np.uint8)


def _change(path: Path, folder: Path, edit: Callable[[onnx.ModelProto], object]) -> Path:
    """Return a copy of the file with ``edit`` applied to its model."""
    model = read_model(path)
    edit(model)
    write_whole(folder / "changed.onnx", model.SerializeToString())
    return folder / "changed.onnx"


def _failed(checks: tuple[Check, ...]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def test_a_good_file_passes_on_a_thousand_images(network: Network, exported: Path) -> None:
    images = _images(1000)
    labels = onnx_predictions(exported, images)
    result = verify_export(exported, network, images, labels=labels, opset=18)
    result.require()
    assert result.passed
    assert result.num_images == 1000
    assert result.top1_agreement == result.accuracy == result.network_accuracy == 1.0
    assert result.max_difference is not None
    assert result.max_difference < 1e-5
    assert len(np.unique(labels)) > 1  # an agreement on one class alone would say nothing


def test_the_result_follows_its_schema(network: Network, exported: Path) -> None:
    validator = Draft202012Validator(load_schema("verify"))
    for result in (
        verify_export(exported, network, _images(32), labels=np.zeros(32, np.int64)),
        verify_file(exported),
    ):
        plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert list(validator.iter_errors(plain)) == []
    assert str(exported.parent) not in json.dumps(plain)


def test_a_tensor_and_a_fixed_batch_that_does_not_divide_the_images_are_taken(
    network: Network, tmp_path: Path
) -> None:
    path = _export(network, tmp_path / "m.onnx", batch_size=5)
    result = verify_export(path, network, torch.from_numpy(_images(33)), limits=FEW)
    assert result.passed
    assert "batch_size_difference" not in {check.name for check in result.checks}


def test_the_network_is_left_in_its_mode(network: Network, exported: Path) -> None:
    training = copy.deepcopy(network).train()
    assert verify_export(exported, training, _images(32), limits=FEW).passed
    assert training.training


def test_too_few_images_fail_the_gate(network: Network, exported: Path) -> None:
    result = verify_export(exported, network, _images(999))
    assert _failed(result.checks) == {"real_images"}
    with pytest.raises(GateError, match=r"^model\.onnx: real_images = 999; expected >= 1000$"):
        result.require()


def _perturb(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name.endswith("stem.weight"))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def test_a_weight_that_differs_slightly_fails(network: Network, exported: Path, tmp_path: Path) -> None:
    result = verify_export(_change(exported, tmp_path, _perturb), network, _images(32), limits=FEW)
    assert _failed(result.checks) >= {"max_difference"}
    with pytest.raises(GateError, match=r"changed\.onnx: max_difference = \S+; expected <= 0\.0001"):
        result.require()


def test_other_classes_fail_agreement_and_accuracy(network: Network, exported: Path) -> None:
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.get_parameter("layers.classifier.linear.weight").neg_()
    images = _images(64)
    labels = 3 - onnx_predictions(exported, images)
    right = verify_export(exported, other, images, labels=labels, limits=FEW)
    assert {"max_difference", "top1_agreement"} <= _failed(right.checks)
    assert right.accuracy == onnx_accuracy(exported, images, labels).accuracy


def test_a_loss_of_accuracy_fails(network: Network, exported: Path) -> None:
    images = _images(64)
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.get_parameter("layers.classifier.linear.weight").neg_()
        labels = other(torch.from_numpy(images).float()).argmax(dim=1)
    limits = VerifyLimits(max_difference=None, min_top1_agreement=None, max_accuracy_drop=0.01, min_images=1)
    result = verify_export(exported, other, images, labels=labels, limits=limits)
    assert result.network_accuracy == 1.0
    assert _failed(result.checks) == {"accuracy_drop"}


def test_one_image_in_a_thousand_may_differ_exactly() -> None:
    assert Check(name="accuracy_drop", value=(900 - 899) / 1000, relation="<=", limit=0.001).passed
    assert Check(
        name="top1_agreement", value=float(np.mean([1] * 999 + [0])), relation=">=", limit=0.999
    ).passed
    assert not Check(name="max_difference", value=float("nan"), relation="<=", limit=1e-4).passed


def _constant(network: Network, value: float) -> Network:
    """Return a copy whose logits are (value, b, b', b'') for every image."""
    constant = copy.deepcopy(network)
    with torch.no_grad():
        constant.get_parameter("layers.classifier.linear.weight").zero_()
        constant.get_parameter("layers.classifier.linear.bias")[0] = value
    return constant


def test_outputs_that_do_not_depend_on_the_images_fail(network: Network, tmp_path: Path) -> None:
    constant = _constant(network, 1.0)
    result = verify_export(_export(constant, tmp_path / "m.onnx"), constant, _images(32), limits=FEW)
    assert _failed(result.checks) == {"output_variation"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_fail(
    value: float, network: Network, exported: Path, tmp_path: Path
) -> None:
    constant = _constant(network, value)
    assert not runs_alone(_export(constant, tmp_path / "m.onnx")).passed
    result = verify_export(exported, constant, _images(32), limits=FEW)
    assert {"max_difference", "output_variation"} <= _failed(result.checks)
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert list(Draft202012Validator(load_schema("verify")).iter_errors(plain)) == []


def test_another_number_of_classes_is_a_failed_gate(exported: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 9))
    with pytest.raises(GateError, match=r"outputs of shape \(32, 4\); expected \(32, 9\)"):
        verify_export(exported, module, _images(32), limits=FEW)


def test_a_file_that_depends_on_the_batch_fails(exported: Path, network: Network, tmp_path: Path) -> None:
    def couple(model: onnx.ModelProto) -> None:
        """Subtract the mean over the batch from the logits."""
        model.graph.node[-1].output[0] = "before"
        mean = helper.make_node("ReduceMean", ["before", "axes"], ["batch_mean"], keepdims=1)
        model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "axes"))
        model.graph.node.extend([mean, helper.make_node("Sub", ["before", "batch_mean"], ["logits"])])

    result = verify_export(_change(exported, tmp_path, couple), network, _images(32), limits=FEW)
    assert "batch_size_difference" in _failed(result.checks)


def _add_batch_norm(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = "before"
    names = ["gamma", "beta", "mu", "var"]
    model.graph.initializer.extend(numpy_helper.from_array(np.ones(4, np.float32), name) for name in names)
    model.graph.node.append(helper.make_node("BatchNormalization", ["before", *names], ["logits"]))


def _add_input(model: onnx.ModelProto) -> None:
    first = model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info(first.name, first.data_type, list(first.dims)))


def _add_path(model: onnx.ModelProto) -> None:
    model.graph.node[3].doc_string = 'File "/home/someone/project/train.py", line 3'


def _add_path_to_value(model: onnx.ModelProto) -> None:
    model.graph.output[0].metadata_props.add(key="trace", value="see C:\\Users\\someone")


def _add_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _make_external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def _break_graph(model: onnx.ModelProto) -> None:
    model.graph.node[2].input[0] = "nothing"


def _break_shape(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (_add_batch_norm, {"batch_norm_nodes"}),
        (_add_input, {"initializers_among_inputs"}),
        (_add_path, {"machine_paths"}),
        (_add_path_to_value, {"machine_paths"}),
        (_add_domain, {"foreign_domains"}),
        (_make_external, {"external_tensors", "onnx_checker"}),
        (_break_graph, {"onnx_checker", "shape_inference"}),
        (_break_shape, {"onnx_checker", "shape_inference"}),
    ],
)
def test_each_flaw_fails_its_check(
    edit: Callable[[onnx.ModelProto], None], expected: set[str], exported: Path, tmp_path: Path
) -> None:
    assert inspect_model(exported).passed
    report = inspect_model(_change(exported, tmp_path, edit))
    assert _failed(report.checks) == expected


def test_in_a_file_of_others_batch_norm_is_no_flaw(exported: Path, tmp_path: Path) -> None:
    def as_of_others(model: onnx.ModelProto) -> None:
        _add_batch_norm(model)
        del model.metadata_props[:]

    assert _failed(verify_file(_change(exported, tmp_path, _add_batch_norm)).checks) == {"batch_norm_nodes"}
    assert verify_file(_change(exported, tmp_path, as_of_others)).passed


def test_before_ir_version_4_weights_stand_among_the_inputs(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((2, 4), np.float32), "w")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "w", "y")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:2], values[2:], [weight]
    )
    failed = {}
    for ir_version in (3, 4):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=ir_version)
        path = tmp_path / f"{ir_version}.onnx"
        path.write_bytes(model.SerializeToString())
        failed[ir_version] = _failed(inspect_model(path).checks)
    assert failed == {3: set(), 4: {"initializers_among_inputs"}}


@pytest.mark.parametrize(
    "dtype", [TensorProto.UINT8, TensorProto.INT64, TensorProto.FLOAT16, TensorProto.BOOL]
)
def test_files_of_any_input_type_run_alone(dtype: int, tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, dtype, ["n", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    path = tmp_path / "m.onnx"
    path.write_bytes(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
        ).SerializeToString()
    )
    report = runs_alone(path)
    assert (report.passed, report.detail) == (True, "outputs of shape [1, 4]")


def test_another_opset_than_the_one_asked_for_fails(exported: Path) -> None:
    assert _failed(inspect_model(exported, opset=19).checks) == {"opset"}


def test_a_file_that_cannot_run_is_not_compared(network: Network, exported: Path, tmp_path: Path) -> None:
    path = _change(exported, tmp_path, _make_external)
    result = verify_export(path, network, _images(32), limits=FEW)
    assert {"runs_alone", "external_tensors"} <= _failed(result.checks)
    assert result.max_difference is None
    with pytest.raises(GateError, match=r"more checks failed$"):
        result.require()


def test_the_report_says_what_is_inside(network: Network, exported: Path) -> None:
    report = inspect_model(exported)
    assert (report.inputs[0].name, report.inputs[0].shape) == ("images", ("batch", 1, 28, 28))
    assert (report.outputs[0].dtype, report.outputs[0].shape) == ("float", ("batch", 4))
    assert report.operators["Conv"] == sum(isinstance(m, nn.Conv2d) for m in network.modules())
    assert report.file_size == exported.stat().st_size


@pytest.mark.parametrize(
    "text",
    [
        "/home/a/b.py",
        "see /usr/lib/x",
        '{"p": "/root/x"}',
        "C:\\a",
        "file://x",
        "~/models",
        'File "x.py", line 3',
    ],
)
def test_a_path_of_the_machine_is_found(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize(
    "text", ["n/a", "https://example.org/a/b", "img/s", '["T-shirt/top"]', "1/2", "a: /"]
)
def test_what_only_looks_like_a_path_is_not(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_a_file_runs_alone(exported: Path) -> None:
    report = runs_alone(exported)
    assert report.passed
    assert report.detail == "outputs of shape [1, 4]"


def test_a_lone_file_gets_its_accuracy(exported: Path) -> None:
    images = _images(20)
    labels = onnx_predictions(exported, images)
    labels[:5] = (labels[:5] + 1) % 4
    result = verify_file(exported, images, labels=labels)
    assert result.passed
    assert result.accuracy == 0.75


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _garble(content: bytes) -> bytes:
    return b"<!DOCTYPE html>" + content


def _empty(content: bytes) -> bytes:
    return content[:0]


@pytest.mark.parametrize("damage", [_truncate, _garble, _empty])
@pytest.mark.parametrize("use", [inspect_model, runs_alone, OnnxClassifier, verify_file])
def test_a_file_that_is_not_onnx_is_named(
    damage: Callable[[bytes], bytes], use: Callable[[Path], object], exported: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(damage(exported.read_bytes()))
    with pytest.raises(UsageError, match=r"bad\.onnx: not an ONNX (file|model), or cut short") as caught:
        use(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for use in (inspect_model, runs_alone, OnnxClassifier):
        with pytest.raises(UsageError, match=r"gone\.onnx: cannot be read \(No such file"):
            use(tmp_path / "gone.onnx")
