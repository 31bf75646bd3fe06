"""ONNX graphs of layers and networks, and the size of the file that they make."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from nasdeploy.costs.file_size import file_size_table
from nasdeploy.costs.graphs import (
    EMITTERS,
    IR_VERSION,
    LayerWeights,
    NamedLayer,
    chain_graph,
    network_graph,
    random_weights,
    serialise,
    weight_shapes,
)
from nasdeploy.costs.table_models import stratified_architectures
from nasdeploy.errors import ConfigError
from nasdeploy.networks import LAYER_KINDS, Network, Normalise, build_layer, build_network
from nasdeploy.spaces import Architecture, LayerSpec, SearchSpace, make_space

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD = LayerSpec(kind="head", in_channels=8, out_channels=16, size=4)
CLASSIFIER = LayerSpec(kind="classifier", in_channels=16, out_channels=3, size=4)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """The default space for small grey images."""
    return make_space("mobile", (1, 28, 28), 10)


def with_random_weights(
    space: SearchSpace, architecture: Architecture, rng: np.random.Generator
) -> list[NamedLayer]:
    return [(name, spec, random_weights(spec, rng)) for name, spec in space.named_layers(architecture)]


def whole_graph(
    space: SearchSpace, architecture: Architecture, *, batch_size: int | None = None, opset: int = 18
) -> onnx.ModelProto:
    return network_graph(
        with_random_weights(space, architecture, np.random.default_rng(0)),
        image_shape=space.input_shape(architecture),
        mean=[70.0],
        scale=[0.0125],
        batch_size=batch_size,
        opset=opset,
    )


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(serialise(model), providers=["CPUExecutionProvider"])


def fold(conv_norm: nn.Module, prefix: str = "") -> LayerWeights:
    """Batch norm folded in float64: w * g / sqrt(v + e), b - m * g / sqrt(v + e)."""
    conv, norm = conv_norm[0], conv_norm[1]
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = conv.weight.double() * gain.view(-1, 1, 1, 1)
    bias = norm.bias.double() - norm.running_mean.double() * gain
    return {
        f"{prefix}weight": weight.detach().numpy().astype(np.float32),
        f"{prefix}bias": bias.detach().numpy().astype(np.float32),
    }


def folded(layer: nn.Module, spec: LayerSpec) -> LayerWeights:
    if spec.kind == "inverted_residual":
        parts = [
            fold(layer.get_submodule(part), f"{part}.") for part in ("expansion", "depthwise", "projection")
        ]
        return {name: array for part in parts for name, array in part.items()}
    if spec.kind == "classifier":
        linear = layer.get_submodule("linear")
        return {"weight": linear.weight.detach().numpy(), "bias": linear.bias.detach().numpy()}
    return fold(layer)


def with_used_statistics(network: Network) -> Network:
    """Give every batch norm a state that is not the identity, as training does."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0.0, 0.5, generator=generator)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0.0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def test_every_layer_kind_has_a_graph() -> None:
    assert set(EMITTERS) == set(LAYER_KINDS)


@pytest.mark.parametrize(
    ("sizes", "seed"),
    [*(((28,), seed) for seed in range(3)), ((64,), 0), ((96,), 0), ((160,), 1), ((224,), 0)]
    + [((96, 128, 160), seed) for seed in range(3)],
)
def test_graph_computes_what_the_folded_network_computes(sizes: tuple[int, ...], seed: int) -> None:
    space = make_space("mobile", (1, sizes[-1], sizes[-1]), 10, sizes)
    rng = np.random.default_rng(seed)
    choices = [int(rng.integers(num)) for num in space.num_candidates()]
    architecture = Architecture((seed, *choices[1:]) if len(sizes) > 1 else tuple(choices))
    image_shape = space.input_shape(architecture)
    normalise = Normalise((72.94,), (90.02,))
    network = with_used_statistics(build_network(space, architecture, normalise))
    model = network_graph(
        [(name, spec, folded(network.layer(name), spec)) for name, spec in network.specs.items()],
        image_shape=image_shape,
        mean=normalise.get_buffer("mean").flatten().tolist(),
        scale=normalise.get_buffer("scale").flatten().tolist(),
        batch_size=None,
    )
    images = rng.integers(0, 256, (8, *image_shape)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    (logits,) = session_of(model).run(["logits"], {"images": images})
    assert np.abs(logits - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.mark.parametrize("opset", [18, 20])
def test_graph_passes_the_full_checker(space: SearchSpace, opset: int) -> None:
    model = whole_graph(space, space.largest(), opset=opset)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = {value.name: value.type.tensor_type.shape for value in inferred.graph.value_info}
    assert all(len(shapes[node.output[0]].dim) >= 2 for node in model.graph.node[:-1])
    assert model.ir_version == IR_VERSION
    assert model.opset_import[0].version == opset


def test_same_network_gives_same_bytes(space: SearchSpace) -> None:
    architecture = space.largest()
    assert serialise(whole_graph(space, architecture)) == serialise(whole_graph(space, architecture))


def test_dynamic_batch_accepts_any_number_of_images_and_static_only_its_own(space: SearchSpace) -> None:
    images = np.zeros((5, *space.image_shape), np.float32)
    dynamic, static = (whole_graph(space, space.smallest(), batch_size=size) for size in (None, 2))
    assert session_of(dynamic).run(None, {"images": images})[0].shape == (5, 10)
    assert session_of(static).run(None, {"images": images[:2]})[0].shape == (2, 10)
    assert session_of(static).get_inputs()[0].shape == [2, *space.image_shape]


def test_constants_of_relu6_are_stored_once(space: SearchSpace) -> None:
    model = whole_graph(space, space.largest())
    scalars = [tensor.name for tensor in model.graph.initializer if not tensor.dims]
    assert sorted(scalars) == ["six", "zero"]
    assert sum(node.op_type == "Clip" for node in model.graph.node) > 2


def test_random_weights_have_the_shapes_of_the_built_layer(
    space: SearchSpace, rng: np.random.Generator
) -> None:
    for spec in space.decode(space.largest()):
        shapes = {name: array.shape for name, array in random_weights(spec, rng).items()}
        assert shapes == weight_shapes(spec)
        assert shapes == {name: array.shape for name, array in folded(build_layer(spec), spec).items()}


def test_layers_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    other = LayerSpec(kind="classifier", in_channels=24, out_channels=3, size=4)
    layers = [("head", HEAD, random_weights(HEAD, rng)), ("classifier", other, random_weights(other, rng))]
    with pytest.raises(ConfigError, match=r"classifier: takes 24 channels of 4 pixels, .* gives 16 of 4"):
        chain_graph(layers, batch_size=1)


def test_weights_of_another_layer_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(ConfigError, match="head: weights of the shapes"):
        chain_graph([("head", HEAD, random_weights(CLASSIFIER, rng))], batch_size=1)


def test_unknown_kind_is_refused(rng: np.random.Generator) -> None:
    spec = LayerSpec(kind="attention", in_channels=8, out_channels=8, size=4)
    with pytest.raises(ConfigError, match="'attention' has no ONNX graph; expected one of stem"):
        random_weights(spec, rng)


def test_images_of_another_size_than_the_first_layer_are_refused(rng: np.random.Generator) -> None:
    layers = [("head", HEAD, random_weights(HEAD, rng))]
    with pytest.raises(ConfigError, match=r"image_shape = \(8, 5, 5\): the network takes \(8, 4, 4\)"):
        network_graph(layers, image_shape=(8, 5, 5), mean=[0.0] * 8, scale=[1.0] * 8, batch_size=1)


def test_normalisation_needs_one_value_a_channel(rng: np.random.Generator) -> None:
    layers = [("head", HEAD, random_weights(HEAD, rng))]
    with pytest.raises(ConfigError, match="1 means and 1 scales for 8 image channels"):
        network_graph(layers, image_shape=(8, 4, 4), mean=[0.0], scale=[1.0], batch_size=1)


@pytest.mark.parametrize("sizes", [(28,), (224,), (96, 128, 160)])
def test_file_size_table_predicts_the_serialised_network(
    sizes: tuple[int, ...], rng: np.random.Generator
) -> None:
    space = make_space("mobile", (1, sizes[-1], sizes[-1]), 10, sizes)
    architectures = [space.smallest(), space.largest(), *stratified_architectures(space, 10, rng)]
    predicted = file_size_table(space, metadata_bytes=100).of(np.array([a.choices for a in architectures]))
    for architecture, size in zip(architectures, predicted, strict=True):
        true_size = 100 + len(serialise(whole_graph(space, architecture)))
        assert abs(size - true_size) <= 64


def test_file_size_does_not_depend_on_the_resolution(rng: np.random.Generator) -> None:
    space = make_space("mobile", (1, 160, 160), 10, (96, 128, 160))
    table = file_size_table(space)
    for architecture in stratified_architectures(space, 5, rng):
        at_every_size = [Architecture((r, *architecture.choices[1:])) for r in range(3)]
        assert len(set(table.of(np.array([a.choices for a in at_every_size])))) == 1
        written = [len(serialise(whole_graph(space, a))) for a in at_every_size]
        assert max(written) - min(written) <= 4  # the digits of the size itself
