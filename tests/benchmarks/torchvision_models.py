"""Well-known networks in ONNX Runtime on this CPU, fp32 against INT8.

    python tests/benchmarks/torchvision_models.py --output torchvision.json [--threads 1] [--models NAME ...] [--quick]

The networks are torchvision's, for images of 3x224x224, one at a time, untrained: the time of a run does not depend on
the weights, except where values become denormal numbers, so batch norms get the statistics of made-up images and
every layer's output is checked. Export: torch.onnx.export, opset 18. INT8: static QDQ, weights per channel, as
``nasdeploy export`` makes it, with ranges from made-up images; accuracy cannot be told from this. Each network's two
files are measured by ``nasdeploy.bench`` in the same blocks, up to three times where the machine did not hold still.

Files and results are kept in --models-dir: a second call continues where the first one was stopped, and measures again
only with --again. FLOPs are fvcore's: one multiply-add is one; what it does not count (hard-swish and the like, at most
a few per cent) is left out. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import nasdeploy
from nasdeploy.costs.comparison import FULL, QUICK, BenchProtocol
from nasdeploy.costs.machine import describe_difference, machine_fingerprint
from nasdeploy.exporters import make_exporter
from nasdeploy.exporters.quantization import quantize_model
from nasdeploy.exporters.runtime import OnnxClassifier
from nasdeploy.files import write_json

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore.nn calls torch.jit.script when it is imported
    from fvcore.nn import FlopCountAnalysis

SCHEMA = "nasdeploy/torchvision-benchmark/1"
NETWORKS = {
    "mobilenet_v2": "MobileNetV2",
    "mobilenet_v3_small": "MobileNetV3-small",
    "mobilenet_v3_large": "MobileNetV3-large",
    "shufflenet_v2_x1_0": "ShuffleNetV2 1.0",
    "squeezenet1_1": "SqueezeNet 1.1",
    "mnasnet1_0": "MNASNet 1.0",
    "efficientnet_b0": "EfficientNet-B0",
    "resnet18": "ResNet-18",
}
IMAGE_SHAPE = (3, 224, 224)
OPSET = 18
NUM_NORM_BATCHES, NORM_BATCH = 4, 8
NUM_CALIBRATION_IMAGES = 32
NUM_CHECK_IMAGES = 16
HEADER = (
    "network",
    "params",
    "FLOPs",
    "fp32 file",
    "INT8 file",
    "fp32 p50 (blocks)",
    "INT8 p50 (blocks)",
    "INT8 speed-up (blocks)",
    "noise floor",
    "INT8 is",
)
INT8 = "int8.onnx"


def made_up_images(count: int, *, seed: int) -> torch.Tensor:
    """Return images (count, 3, 224, 224) of pixels 0..127: noise of five wave lengths, and single pixels in turn.

    The latter are what ``nasdeploy bench`` feeds: networks are to be in their element there.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, side = IMAGE_SHAPE[0], IMAGE_SHAPE[1]
    images = torch.zeros(count, *IMAGE_SHAPE)
    for size in (7, 14, 28, 56, 112):
        noise = torch.randn(count, channels, size, size, generator=generator)
        images += F.interpolate(noise, size=(side, side), mode="bilinear", align_corners=False)
    images = 64.0 + 32.0 * images / images.std(dim=(1, 2, 3), keepdim=True)
    images[1::2] = torch.randint(0, 128, images[1::2].shape, generator=generator).float()
    return images.clamp(0.0, 127.0).round()


def make_network(name: str) -> nn.Module:
    """Return the untrained network with the batch-norm statistics of made-up images, for inference."""
    torch.manual_seed(0)
    network: nn.Module = getattr(torchvision.models, name)(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    network.train()
    with torch.no_grad():
        for n in range(NUM_NORM_BATCHES):
            network(made_up_images(NORM_BATCH, seed=n))
    return network.eval()


def check_values(network: nn.Module, images: torch.Tensor) -> float:
    """Return the standard deviation of the logits over ``images``.

    Raises RuntimeError where a layer gives a denormal number or none at all, or where all logits are the same.
    """
    faults: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not isinstance(output, torch.Tensor):
                return
            small = (output != 0.0) & (output.abs() < torch.finfo(torch.float32).tiny)
            if not bool(output.isfinite().all()) or bool(small.any()):
                faults.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in network.named_modules()]
    with torch.no_grad():
        logits = network(images)
    for handle in handles:
        handle.remove()
    deviation = float(logits.std(dim=0).mean())
    if faults or not 1e-6 < deviation < 1e6:
        raise RuntimeError(
            f"{type(network).__name__}: denormal or infinite values in {faults[:3]}, logits vary by {deviation:.1e}; "
            "expected ordinary numbers: its times would not be those of a trained network"
        )
    return deviation


def calibration_batches() -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
    """Yield made-up images one at a time."""
    for image in made_up_images(NUM_CALIBRATION_IMAGES, seed=1000):
        yield image[None].numpy()


def write_files(name: str, folder: Path) -> dict[str, Any]:
    """Write ``fp32.onnx`` and ``int8.onnx`` into ``folder`` and return what there is to say about the network.

    What is already there, with its facts, is left as it is.
    """
    facts_path = folder / "network.json"
    if facts_path.exists():
        return dict(json.loads(facts_path.read_text(encoding="utf-8")))
    network = make_network(name)
    images = made_up_images(NUM_CHECK_IMAGES, seed=2000)
    deviation = check_values(network, images)
    analysis = FlopCountAnalysis(network, images[:1])
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    flops = int(analysis.total())
    started = time.perf_counter()
    exported = make_exporter("torch").export(
        network,
        image_shape=IMAGE_SHAPE,
        path=folder / "fp32.onnx",
        opset=OPSET,
        batch_size=1,
        metadata={},
    )
    quantized = quantize_model(
        exported.path, path=folder / INT8, batches=calibration_batches(), exporter="torch", metadata={}
    )
    facts = {
        "name": NETWORKS[name],
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "flops": flops,
        "not_counted_by_fvcore": dict(analysis.unsupported_ops()),
        "fp32_bytes": exported.file_size,
        "int8_bytes": quantized.file_size,
        "logit_deviation": deviation,
        "int8_logit_correlation": logit_correlation(network, images, quantized.path),
        "seconds_to_write": time.perf_counter() - started,
    }
    write_json(facts_path, facts)
    return facts


def logit_correlation(network: nn.Module, images: torch.Tensor, int8: Path) -> float:
    """Return how the INT8 file's logits go with the network's: that its ranges are not nonsense."""
    with torch.no_grad():
        expected = network(images).numpy()
    got = OnnxClassifier(int8).logits(images.numpy())
    return float(np.corrcoef(expected.ravel(), got.ravel())[0, 1])


def measure(folder: Path, *, threads: int, protocol: BenchProtocol) -> dict[str, Any]:
    """Measure both files, again while the machine is in doubt as the protocol says; return the row and all of it."""
    result = nasdeploy.bench([folder / "fp32.onnx", folder / INT8], threads=threads, protocol=protocol)
    fp32, int8 = result.models
    assert int8.relative is not None
    return {
        "attempts": len(result.comparison.attempts),
        "doubt": result.comparison.doubt,
        "fp32_p50_ms": fp32.latency.p50_ms,
        "fp32_range_ms": list(fp32.latency.p50_range_ms),
        "int8_p50_ms": int8.latency.p50_ms,
        "int8_range_ms": list(int8.latency.p50_range_ms),
        # The ratio is that of times; how many times as fast is its inverse, and its ends change places.
        "speed_up": 1.0 / int8.relative.ratio,
        "speed_up_range": [1.0 / int8.relative.largest_ratio, 1.0 / int8.relative.smallest_ratio],
        "noise_floor": result.comparison.noise_floor,
        "reference_spread": result.comparison.reference.spread,
        "verdict": int8.relative.verdict,
        "bench": result.to_json(),
    }


def describe(row: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a network."""

    def ms(kind: str) -> str:
        low, high = row[f"{kind}_range_ms"]
        return f"{row[f'{kind}_p50_ms']:.2f} ({low:.2f}-{high:.2f}) ms"

    low, high = row["speed_up_range"]
    return (
        facts["name"] + (" *" if row["doubt"] else ""),
        f"{facts['params'] / 1e6:.2f} M",
        f"{facts['flops'] / 1e6:.0f} M",
        f"{facts['fp32_bytes'] / 1e6:.1f} MB",
        f"{facts['int8_bytes'] / 1e6:.1f} MB",
        ms("fp32"),
        ms("int8"),
        f"{row['speed_up']:.2f}x ({low:.2f}-{high:.2f})",
        f"{100 * row['noise_floor']:.1f} %",
        row["verdict"],
    )


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """Return the table."""
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 2), "---"), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions(*, threads: int, protocol: BenchProtocol) -> dict[str, Any]:
    """Return what all rows of a table must share."""
    packages = {name: version(name) for name in ("torch", "torchvision", "onnx", "onnxruntime", "fvcore")}
    return {
        "threads": threads,
        "protocol": protocol.to_json(),
        "image_shape": list(IMAGE_SHAPE),
        "opset": OPSET,
        "packages": packages | {"nasdeploy": nasdeploy.__version__},
    }


def stored_row(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the measurement in ``path``; None where it is missing, of other conditions or of another machine."""
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    same_machine = not describe_difference(stored["machine"], machine_fingerprint())
    return stored["row"] if stored["conditions"] == wanted and same_machine else None


def read_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--models-dir", type=Path, default=Path("torchvision-models"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the quick protocol of nasdeploy bench")
    parser.add_argument("--smoke", action="store_true", help="a few runs: only to see that the script works")
    parser.add_argument("--again", action="store_true", help="measure also what is already measured")
    parser.add_argument("--output", type=Path, help="all results as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(1)
    protocol = QUICK if arguments.quick else FULL
    if arguments.smoke:
        protocol = BenchProtocol(blocks=2, min_runs=10, min_seconds=0.0, max_seconds=1.0, num_starts=1)
    wanted = conditions(threads=arguments.threads, protocol=protocol)
    rows, results = [], {}
    for name in arguments.models:
        folder = arguments.models_dir / name
        facts = write_files(name, folder)
        kept = folder / f"measured-{arguments.threads}.json"
        row = None if arguments.again else stored_row(kept, wanted)
        if row is None:
            row = measure(folder, threads=arguments.threads, protocol=protocol)
            write_json(kept, {"conditions": wanted, "machine": machine_fingerprint(), "row": row})
        rows.append(describe(row, facts))
        results[name] = {"facts": facts, "row": row}
        if not arguments.output:
            print(" | ".join(rows[-1]), flush=True)
    machine = machine_fingerprint()
    if arguments.output:
        write_json(
            arguments.output,
            {"schema": SCHEMA, "machine": machine, "conditions": wanted, "networks": results},
        )
    print(markdown(rows))
    versions = ", ".join(f"{name} {number}" for name, number in wanted["packages"].items())
    print(
        f"\n{machine['cpu']}, {arguments.threads} thread(s), {machine['release']}, Python {machine['python']}"
    )
    print(f"{versions}; batch 1, {'x'.join(map(str, IMAGE_SHAPE))}, opset {OPSET}, untrained weights")
    print(
        f"{protocol.blocks} blocks in fresh processes, per file at least {protocol.min_runs} runs and "
        f"{protocol.min_seconds:g} s; speed-up: median of the blocks' ratios of median CPU times; "
        f"{sum(result['row']['attempts'] for result in results.values())} measurements for {len(results)} networks"
    )
    for result in results.values():
        if doubt := result["row"]["doubt"]:
            print(f"* {result['facts']['name']}: {doubt}")


if __name__ == "__main__":
    main()
