"""Image sets as others distribute them: CIFAR, IDX, parquet and encoded images in .npz files."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nasdeploy.data import Dataset, StoredImages, load_dataset
from nasdeploy.data.cifar import load_cifar
from nasdeploy.data.contents import Request
from nasdeploy.data.layouts import LAYOUTS
from nasdeploy.data.parquet import _Shard, _StoredRows
from nasdeploy.data.unpickling import load_plain_pickle
from nasdeploy.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]


def load(path: Path, **options) -> Dataset:
    return load_dataset(str(path), **{"seed": 0} | options)


def all_images(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of train and valid together, sorted by the first pixel."""
    images = torch.cat([dataset.train.images, dataset.valid.images])
    labels = torch.cat([dataset.train.labels, dataset.valid.labels])
    order = images[:, 0, 0, 0].argsort()
    return images[order], labels[order]


# ── CIFAR ────────────────────────────────────────────────────────────────────────────────────────


def cifar_images(rng: np.random.Generator, count: int, *, first: int = 0) -> np.ndarray:
    """Images (count, 3072), channel after channel; image i has ``first`` + i as its first pixel."""
    images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    images[:, 0] = first + np.arange(count)
    return images


@pytest.fixture
def cifar10(rng) -> list[tuple[np.ndarray, list[int]]]:
    """Two batches of ten images, label = image modulo 2, and a test batch of six."""
    sizes = (10, 10, 6)
    return [(cifar_images(rng, n, first=10 * b), [i % 2 for i in range(n)]) for b, n in enumerate(sizes)]


def write_binary_cifar10(folder: Path, batches: list[tuple[np.ndarray, list[int]]]) -> None:
    folder.mkdir(exist_ok=True)
    for name, (images, labels) in zip(
        ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"), batches, strict=True
    ):
        records = np.concatenate([np.array(labels, np.uint8)[:, np.newaxis], images], axis=1)
        (folder / name).write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("cat\ndog\n\n")


def write_python_cifar10(
    folder: Path, batches: list[tuple[np.ndarray, list[int]]], protocol: int = 2
) -> None:
    folder.mkdir(exist_ok=True)
    for name, (images, labels) in zip(("data_batch_1", "data_batch_2", "test_batch"), batches, strict=True):
        content = {
            b"batch_label": name.encode(),
            b"labels": labels,
            b"data": images,
            b"filenames": [b"x.png"],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    names = {b"num_cases_per_batch": 10, b"label_names": [b"cat", b"dog"], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol))


@pytest.mark.parametrize("write", [write_binary_cifar10, write_python_cifar10])
def test_cifar10_is_read_in_both_layouts(tmp_path, cifar10, write):
    write(tmp_path / "cifar", cifar10)
    (tmp_path / "cifar" / "readme.html").touch()
    dataset = load(tmp_path / "cifar")
    assert (dataset.class_names, dataset.image_shape) == (("cat", "dog"), (3, 32, 32))
    images, labels = all_images(dataset)
    expected = np.concatenate([cifar10[0][0], cifar10[1][0]]).reshape(20, 3, 32, 32)
    assert np.array_equal(images.numpy(), expected)
    assert labels.tolist() == [0, 1] * 10
    assert np.array_equal(dataset.test.images.flatten(1).numpy(), cifar10[2][0])


def test_both_layouts_of_cifar10_are_one_dataset(tmp_path, cifar10):
    write_binary_cifar10(tmp_path / "binary", cifar10)
    fingerprints = {load(tmp_path / "binary").fingerprint()}
    for protocol in range(5):
        write_python_cifar10(tmp_path / "python", cifar10, protocol)
        fingerprints.add(load(tmp_path / "python").fingerprint())
    assert len(fingerprints) == 1


def test_batches_of_cifar_are_taken_by_number(tmp_path, rng):
    for number in range(1, 13):
        records = np.full((3, 3073), number, np.uint8)
        (tmp_path / f"data_batch_{number}.bin").write_bytes(records.tobytes())
    train = load_cifar(Request(path=tmp_path, image_size=None)).train
    assert train.labels.tolist() == np.repeat(np.arange(1, 13), 3).tolist()


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_cifar100_has_its_fine_labels(tmp_path, rng, layout):
    fine, coarse = np.arange(12) % 3, np.arange(12) % 2
    images = cifar_images(rng, 12)
    for name, chosen in (("train", slice(None)), ("test", slice(0, 3))):
        if layout == "binary":
            labels = np.stack([coarse[chosen], fine[chosen]], axis=1).astype(np.uint8)
            records = np.concatenate([labels, images[chosen]], axis=1)
            (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
        else:
            content = {
                "data": images[chosen],
                "fine_labels": fine[chosen].tolist(),
                "coarse_labels": [0] * 12,
            }
            (tmp_path / name).write_bytes(pickle.dumps(content))
    if layout == "binary":
        (tmp_path / "fine_label_names.txt").write_text("apple\nbear\nbed\n")
        (tmp_path / "coarse_label_names.txt").write_text("fruit\nbeasts\n")
    else:
        names = {"fine_label_names": ["apple", "bear", "bed"], "coarse_label_names": ["fruit", "beasts"]}
        (tmp_path / "meta").write_bytes(pickle.dumps(names))
    dataset = load(tmp_path, image_size=16)
    assert (dataset.class_names, dataset.image_shape) == (("apple", "bear", "bed"), (3, 16, 16))
    assert torch.bincount(torch.cat([dataset.train.labels, dataset.valid.labels])).tolist() == [4, 4, 4]
    assert dataset.test.labels.tolist() == [0, 1, 2]


def test_cifar_without_names_and_test_batch_is_divided(tmp_path, cifar10):
    write_binary_cifar10(tmp_path, cifar10)
    (tmp_path / "batches.meta.txt").unlink()
    (tmp_path / "test_batch.bin").unlink()
    dataset = load(tmp_path)
    assert dataset.class_names == ("0", "1")
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [14, 2, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_1.bin", b"x" * 5000, r"data_batch_1\.bin: 5000 bytes; expected a multiple of 3073"),
        ("data_batch_2.bin", b"", r"data_batch_2\.bin: 0 bytes; expected a multiple of 3073"),
        ("data_batch_2.bin", None, r"no batch 2 beside .*data_batch_1\.bin"),
        ("batches.meta.txt", b"\xff\xfe", r"batches\.meta\.txt: not a readable text file"),
        ("batches.meta.txt", b"cat\n", r"1 class \(cat\)"),
        (
            "test_batch.bin",
            b"\x05" + b"x" * 3072,
            r"test: label 5 of image 0 is out of range; expected 0 to 1",
        ),
    ],
)
def test_damaged_binary_cifar_is_refused(tmp_path, cifar10, name, content, message):
    write_binary_cifar10(tmp_path, cifar10)
    (tmp_path / "data_batch_3.bin").write_bytes((tmp_path / "data_batch_1.bin").read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_1", [1, 2], "data_batch_1: holds a list; expected a dict"),
        ("data_batch_1", {"labels": [0, 1]}, r"no 'data' of uint8 and shape \(N, 3072\)"),
        ("data_batch_1", {"data": np.zeros((2, 3072)), "labels": [0, 1]}, "no 'data' of uint8"),
        (
            "data_batch_1",
            {"data": np.zeros((2, 3072), np.uint8), "labels": [0]},
            "no 'labels' with 2 integers",
        ),
        (
            "data_batch_1",
            {"data": np.zeros((2, 3072), np.uint8), "labels": [0, "1"]},
            "no 'labels' with 2 int",
        ),
        ("batches.meta", {"label_names": 3}, "batches.meta: no list 'label_names'"),
    ],
)
def test_other_pickles_are_no_cifar(tmp_path, cifar10, name, content, message):
    write_python_cifar10(tmp_path, cifar10)
    (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


# ── pickles ──────────────────────────────────────────────────────────────────────────────────────


class Calls:
    """Pickles as a call: what a pickle from a stranger can hold."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_malicious_pickle_runs_nothing(tmp_path, cifar10, protocol):
    import os

    write_python_cifar10(tmp_path, cifar10)
    mark = tmp_path / "executed"
    for attack in (
        Calls(os.system, f"touch {mark}"),
        Calls(eval, f"open({str(mark)!r}, 'w')"),
        Calls(getattr, mark, "touch"),
        Calls(subprocess.run, ["touch", str(mark)]),
    ):
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": attack}, protocol))
        with pytest.raises(
            DataError, match=r"data_batch_1: the pickle asks for \S+; .* nothing is run"
        ) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
        assert not mark.exists()
    pickle.loads((tmp_path / "data_batch_1").read_bytes())
    assert mark.exists(), "the last attack would have worked"


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (np.array([{}], dtype=object), r"an array of '\|?O8?'"),
        (np.array(["text"]), "an array of 'U4'"),
        (np.float64(1.0), r"numpy\._?core\.multiarray\.scalar"),
        (Path("x"), "pathlib"),
        ({1}, r"builtins\.set|__builtin__\.set"),
        (complex(1, 2), r"builtins\.complex|__builtin__\.complex"),
    ],
)
def test_anything_but_plain_data_is_refused(tmp_path, value, asked):
    (tmp_path / "x").write_bytes(pickle.dumps({"key": value}, 2))
    with pytest.raises(DataError, match=f"the pickle asks for ({asked})"):
        load_plain_pickle(tmp_path / "x")


def test_crafted_array_states_are_refused(tmp_path):
    """Numbers of bytes that do not fit the shape, and a type that turns into one of references by its state."""

    def array_state(shape: tuple[int, ...], kind: bytes, state: bytes, raw: bytes) -> bytes:
        """``_reconstruct(ndarray, (0,), b"b")`` with a state, in protocol 0 opcodes. [pickletools]"""
        build = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
        number = b"cnumpy\ndtype\n(V" + kind + b"\nI00\nI01\ntR" + state
        sizes = b"(" + b"".join(b"I%d\n" % n for n in shape) + b"t"
        return build + b"(I1\n" + sizes + number + b"I00\nV" + raw + b"\ntb."

    plain = b"(I3\nV|\nNNNI-1\nI-1\nI0\ntb"
    (tmp_path / "x").write_bytes(array_state((2, 2), b"u1", plain, b"abcd"))
    assert load_plain_pickle(tmp_path / "x").tolist() == [[97, 98], [99, 100]]
    for shape, kind, state in (
        ((2, 3), b"u1", plain),
        ((10**12,), b"u1", plain),
        ((-4,), b"u1", plain),
        ((2, 2), b"u1", b"(I3\nVO\nNNNI-1\nI-1\nI0\ntb"),
        ((2, 2), b"O8", plain),
        ((2, 2), b"V4", plain),
    ):
        (tmp_path / "x").write_bytes(array_state(shape, kind, state, b"abcd"))
        with pytest.raises(DataError, match=r"x: (not a readable pickle|the pickle asks for an array of)"):
            load_plain_pickle(tmp_path / "x")


FUNCTION = b"c_codecs\nencode\n"
CLASSES_ADMITTED = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize("admitted", [FUNCTION, *CLASSES_ADMITTED])
@pytest.mark.parametrize(
    "state", [b"}(V__defaults__\n(Vlatin1\ntu", b"N}(V__defaults__\n(Vlatin1\ntu\x86", b"}(Vmark\nI01\nu"]
)
def test_pickle_cannot_change_what_it_is_read_with(tmp_path, cifar10, admitted, state):
    """BUILD sets attributes, of a function too, and for the whole process. [pickletools]"""
    from nasdeploy.data.unpickling import ADMITTED

    message = "asks for a change of _codecs.encode" if admitted == FUNCTION else "not a readable pickle"
    before = [(vars(one).copy() if isinstance(one, type) else dir(one)) for one in ADMITTED.values()]
    (tmp_path / "x").write_bytes(b"\x80\x02" + admitted + state + b"b.")
    with pytest.raises(DataError, match=message) as caught:
        load_plain_pickle(tmp_path / "x")
    assert "\n" not in str(caught.value)
    after = [(vars(one).copy() if isinstance(one, type) else dir(one)) for one in ADMITTED.values()]
    assert after == before
    write_python_cifar10(tmp_path / "cifar", cifar10, protocol=0)
    assert load(tmp_path / "cifar").num_classes == 2


def test_a_plain_function_would_have_been_changed():
    """What the test above is about: nothing of it is the unpickler's own doing."""

    def function() -> None: ...

    class Admitting(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            return function

    content = b"\x80\x02" + FUNCTION + b"N}(V__defaults__\n(Vlatin1\ntu\x86b."
    Admitting(io.BytesIO(content)).load()
    assert function.__defaults__ == ("latin1",)


def nested(depth: int, make) -> object:
    """A container with the one before it in two places, and so on: 2^depth of them for who walks through it."""
    value = make(0, 0)
    for _ in range(depth):
        value = make(value, value)
    return value


SHARING = {
    "lists": lambda depth: nested(depth, lambda a, b: [a, b]),
    "tuples": lambda depth: nested(depth, lambda a, b: (a, b)),
    "dicts": lambda depth: nested(depth, lambda a, b: {"a": a, "b": b}),
    "tuples and lists": lambda depth: nested(depth, lambda a, b: ([a], (b,), a)),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", SHARING)
def test_shared_containers_are_refused_at_once(tmp_path, kind, protocol):
    """Two of them are refused as forty are; of forty, nobody could wait for the end."""
    for depth in (1, 40):
        (tmp_path / "x").write_bytes(pickle.dumps({"labels": SHARING[kind](depth)}, protocol))
        start = time.perf_counter()
        with pytest.raises(DataError, match="x: a list, tuple or dict of the pickle stands in two places"):
            load_plain_pickle(tmp_path / "x")
        assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    "content",
    [
        b"]2l.",
        b"]2\x86.",
        b"(K\x01tVtext\n0q\x00h\x00\x86.",  # stored after something else was put on top of it and taken off
        b"(K\x01tq\x00h\x00q\x01h\x01\x86.",
        b"]q\x00h\x00a.",  # a list in itself
        b"}q\x00" + b"K\x01\x85q\x00h\x00\x86q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"K\x01s.",
    ],
    ids=["dup list", "dup", "after pop", "stored twice", "cycle", "key"],
)
def test_no_way_to_share_a_container_is_left(tmp_path, content):
    (tmp_path / "x").write_bytes(b"\x80\x02" + content)
    with pytest.raises(DataError, match="x: a list, tuple or dict of the pickle stands in two places"):
        load_plain_pickle(tmp_path / "x")


@pytest.mark.parametrize("protocol", range(5))
def test_texts_types_and_arrays_may_be_shared(tmp_path, protocol):
    array, text, content, large = np.arange(6), "some text", b"some\xff", b"x" * 100_000
    value = {"a": array, "b": array, "c": np.arange(6), "d": [text, text, content, content, large, large]}
    (tmp_path / "x").write_bytes(pickle.dumps(value, protocol))
    found = load_plain_pickle(tmp_path / "x")
    assert [found[key].tolist() for key in "abc"] == [list(range(6))] * 3
    assert found["d"] == value["d"]


def test_texts_of_python_2_are_read(tmp_path):
    """Its pickles hold byte strings where ours hold bytes or text. [SHORT_BINSTRING, BINSTRING of pickletools]"""
    raw = bytes(range(256))
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x10K\x10\x86cnumpy\ndtype\n"
        b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x01\x00\x00"
    )
    (tmp_path / "x").write_bytes(b"\x80\x02}(U\x04data" + array + raw + b"tbU\x06labels](K\x01K\x02eu.")
    found = load_plain_pickle(tmp_path / "x")
    assert found["labels"] == [1, 2]
    assert found["data"].dtype == np.uint8
    assert found["data"].tolist() == np.frombuffer(raw, np.uint8).reshape(16, 16).tolist()


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("kind", ["u1", "<i4", ">i2", "<f8", "?"])
def test_arrays_of_numbers_are_read_in_every_order(tmp_path, kind, order):
    array = np.asarray(np.arange(6).reshape(2, 3), kind, order=order)
    for protocol in range(5):
        (tmp_path / "x").write_bytes(pickle.dumps([array, (1, 2.5, None, True, b"\xff")], protocol))
        found, others = load_plain_pickle(tmp_path / "x")
        assert found.dtype == array.dtype
        assert found.tolist() == array.tolist()
        assert others == (1, 2.5, None, True, b"\xff")


def test_damaged_pickle_is_refused_in_one_line(tmp_path, rng):
    whole = pickle.dumps({"data": np.zeros((2, 8), np.uint8), "labels": [0, 1]}, 2)
    refused = 0
    for position in range(len(whole)):
        for content in (whole[:position], whole[:position] + b"\xff" + whole[position + 1 :]):
            (tmp_path / "x").write_bytes(content)
            try:
                load_plain_pickle(tmp_path / "x")
            except DataError:
                refused += 1
    assert refused > len(whole)


# ── IDX ──────────────────────────────────────────────────────────────────────────────────────────


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(
    folder: Path, *, train="train", test="t10k", dot="-", zipped=True, first_label=0
) -> dict[str, np.ndarray]:
    """Write 30 training and 6 test images, 8x8, of 3 classes; return them."""
    folder.mkdir(exist_ok=True)
    arrays = {}
    for part, count in ((train, 30), (test, 6)):
        images = np.random.default_rng(count).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        labels = (np.arange(count) % 3 + first_label).astype(np.uint8)
        for kind, axes, array in (("images", 3, images), ("labels", 1, labels)):
            content = idx(array)
            name = f"{part}-{kind}{dot}idx{axes}-ubyte{'.gz' if zipped else ''}"
            (folder / name).write_bytes(gzip.compress(content) if zipped else content)
        arrays |= {part: images}
    return arrays


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"zipped": False},
        {"dot": ".", "zipped": False},
        {"train": "emnist-digits-train", "test": "emnist-digits-test"},
        {"test": "test"},
    ],
)
def test_idx_folder_is_read_under_its_usual_names(tmp_path, names):
    arrays = write_idx(tmp_path / "mnist", **names)
    dataset = load(tmp_path / "mnist")
    assert (dataset.name, dataset.class_names, dataset.image_shape) == ("mnist", ("0", "1", "2"), (1, 8, 8))
    images, labels = all_images(dataset)
    assert np.array_equal(images[:, 0].numpy(), next(iter(arrays.values())))
    assert labels.tolist() == [0, 1, 2] * 10
    assert dataset.test.labels.tolist() == [0, 1, 2] * 2


def test_idx_labels_need_not_begin_with_zero_and_may_have_names(tmp_path):
    write_idx(tmp_path, train="emnist-letters-train", test="emnist-letters-test", first_label=1)
    assert load(tmp_path).class_names == ("1", "2", "3")
    (tmp_path / "emnist-letters-mapping.txt").write_text("1 65 97\n2 66 98\n3 67 99\n4 68 100\n")
    dataset = load(tmp_path, image_size=4)
    assert (dataset.class_names, dataset.image_shape) == (("Aa", "Bb", "Cc"), (1, 4, 4))
    assert dataset.test.labels.tolist() == [0, 1, 2] * 2
    (tmp_path / "emnist-letters-mapping.txt").write_text("1 65 97\n2 66\n")
    with pytest.raises(DataError, match=r"mapping\.txt: not a label and its code points"):
        load(tmp_path)


def test_plain_idx_file_wins_over_the_zipped_one(tmp_path):
    write_idx(tmp_path)
    before = load(tmp_path).fingerprint()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((30, 8, 8), np.uint8)))
    assert load(tmp_path).fingerprint() != before


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
ZEROS = np.zeros((30, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, b"", "begins with nothing; expected 00 00 08 03"),
        (IMAGES, b"\x89PNG\r\n", "begins with 89 50 4e 47; expected 00 00 08 03"),
        (IMAGES, idx(ZEROS.reshape(30, 64)), "begins with 00 00 08 02; expected 00 00 08 03"),
        (IMAGES, idx(ZEROS)[:-1], "1919 bytes of data; expected 1920 by its header, 30x8x8"),
        (IMAGES, idx(ZEROS) + b"x", "1921 bytes of data; expected 1920 by its header"),
        (IMAGES, idx(ZEROS)[:12], "begins with 00 00 08 03; expected"),
        (IMAGES, b"\0\0\x08\x03" + b"\xff" * 12, "0 bytes of data; expected 792281624589241053853"),
        (IMAGES, idx(ZEROS[:29]), "30 labels for 29 images of 8x8"),
        (IMAGES, idx(ZEROS[:, :0]), "30 labels for 30 images of 0x8"),
        (IMAGES, idx(ZEROS[:, :6]), r"the images are 6x8 pixels; expected square images; --image-size 6"),
        (LABELS, None, "no file with the labels of train; it has t10k-images-idx3-ubyte, t10k-"),
        (IMAGES, None, "no file with the images of train"),
        ("t10k-labels-idx1-ubyte", idx(np.full(6, 9, np.uint8)), "label 9 is not in train"),
        ("other-train-images-idx3-ubyte", idx(ZEROS), r"several sets \(one without a name, other\)"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(ZEROS))[:-20], r"idx3-ubyte\.gz: cannot be read"),
        ("train-images-idx3-ubyte.gz", b"no gzip", r"idx3-ubyte\.gz: cannot be read"),
    ],
)
def test_idx_files_that_are_wrong_are_refused(tmp_path, name, content, message):
    write_idx(tmp_path, zipped=False)
    if content is None or name.endswith(".gz"):
        (tmp_path / name.removesuffix(".gz")).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


# ── encoded images ───────────────────────────────────────────────────────────────────────────────


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def coloured(rng) -> np.ndarray:
    """Forty RGB images, 8x8; image i has i as its first value. Label = image modulo 4."""
    images = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(40)
    return images


def blob(part: str, images: np.ndarray) -> dict[str, np.ndarray]:
    files = [encode(image) for image in images]
    return {
        f"{part}_blob": np.frombuffer(b"".join(files), np.uint8),
        f"{part}_offsets": np.cumsum([0, *map(len, files)]),
        f"{part}_labels": np.arange(len(images)) % 4,
    }


def test_encoded_npz_equals_the_one_of_pixels(tmp_path, coloured):
    others = {"meta": np.array("{}"), "coarse_labels": np.zeros(3), "class_names": np.array(list("abcd"))}
    np.savez(tmp_path / "encoded.npz", **blob("train", coloured), **blob("test", coloured[:8]), **others)
    np.savez(
        tmp_path / "pixels.npz",
        train_images=coloured,
        train_labels=np.arange(40) % 4,
        test_images=coloured[:8],
        test_labels=np.arange(8) % 4,
        **others,
    )
    one, two = load(tmp_path / "encoded.npz"), load(tmp_path / "pixels.npz")
    assert one.fingerprint() == two.fingerprint()
    assert one.class_names == ("a", "b", "c", "d")


def test_encoded_npz_can_be_stored(tmp_path, coloured, monkeypatch):
    monkeypatch.setenv("NASDEPLOY_CACHE", str(tmp_path / "cache"))
    np.savez(
        tmp_path / "set.npz",
        **blob("train", coloured),
        **blob("val", coloured[:8]),
        **blob("test", coloured[:4]),
    )
    stored = load(tmp_path / "set.npz", memory_limit=0)
    assert isinstance(stored.train.images, StoredImages)
    assert [len(s) for s in (stored.train, stored.valid, stored.test)] == [40, 8, 4]
    assert stored.fingerprint() == load(tmp_path / "set.npz").fingerprint()


def test_npz_with_a_column_of_labels_and_val_is_read(tmp_path, coloured):
    labels = (np.arange(40) % 4)[:, np.newaxis]
    parts = {"train": 40, "val": 8, "test": 4}
    arrays = {f"{part}_images": coloured[:n] for part, n in parts.items()}
    arrays |= {f"{part}_labels": labels[:n] for part, n in parts.items()}
    np.savez(tmp_path / "medical.npz", **arrays)
    dataset = load(tmp_path / "medical.npz")
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [40, 8, 4]
    np.savez(tmp_path / "medical.npz", **arrays, valid_images=coloured[:4])
    with pytest.raises(DataError, match="no key 'valid_labels'"):
        load(tmp_path / "medical.npz")
    np.savez(tmp_path / "medical.npz", **arrays, valid_images=coloured[:4], valid_labels=labels[:4])
    with pytest.raises(DataError, match=r"has both valid_\* and val_\*"):
        load(tmp_path / "medical.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_offsets": None}, "no key 'train_offsets'"),
        (
            {"train_offsets": np.arange(40)},
            r"'train_offsets' is int64 of shape \(40,\); expected integers of shape \(41,\)",
        ),
        (
            {"train_offsets": np.arange(41) * 10**9},
            "'train_offsets' goes from 0 to 40000000000; expected ascending",
        ),
        ({"train_offsets": np.arange(41)[::-1]}, "'train_offsets' goes from 40 to 0; expected ascending"),
        ({"train_offsets": np.arange(41.0)}, "'train_offsets' is float64"),
        ({"train_blob": np.zeros(9)}, "'train_blob' is float64"),
        ({"train_labels": np.zeros(0, np.int64)}, "'train_labels' is int64 of shape"),
        ({"test_images": np.zeros((3, 8, 8), np.uint8)}, "no key 'test_blob'"),
        ({"extra_blob": np.zeros(3)}, "unexpected key 'extra_blob'; expected images only of train, valid"),
        ({"train_blob": np.zeros(10**5, np.uint8)}, r"set\.npz: train image 0: not a readable image"),
    ],
)
def test_encoded_npz_that_is_wrong_is_refused(tmp_path, coloured, changes, message):
    arrays = blob("train", coloured) | changes
    np.savez(tmp_path / "set.npz", **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "set.npz")
    assert "\n" not in str(caught.value)


# ── layouts ──────────────────────────────────────────────────────────────────────────────────────


def test_unknown_folder_lists_every_layout(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="is a folder of no known layout; expected one of: ") as caught:
        load(tmp_path)
    assert all(layout.name in str(caught.value) for layout in LAYOUTS)
    assert "\n" not in str(caught.value)


def test_what_the_system_refuses_is_told_in_one_line(tmp_path):
    with pytest.raises(DataError, match="not found"):
        load_dataset("x" * 5000, seed=0)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "loop.png").symlink_to("loop.png")
    with pytest.raises(
        DataError, match=r"data: .*cat/loop\.png: Too many levels of symbolic links"
    ) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_layout_is_recognised_as_itself(tmp_path, cifar10):
    made = [tmp_path / name for name in ("x.npz", "x.parquet", "binary", "python", "idx", "classes")]
    made[0].touch()
    made[1].touch()
    write_binary_cifar10(made[2], cifar10)
    write_python_cifar10(made[3], cifar10)
    write_idx(made[4])
    (made[5] / "train" / "cat").mkdir(parents=True)
    for path, expected in zip(made, LAYOUTS, strict=True):
        assert [layout.name for layout in LAYOUTS if layout.detect(path)] == [expected.name]


# ── parquet ──────────────────────────────────────────────────────────────────────────────────────


def test_missing_pyarrow_names_the_command(tmp_path):
    (tmp_path / "train.parquet").touch()
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from nasdeploy.data import load_dataset; load_dataset(sys.argv[1], seed=0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("nasdeploy.errors.ConfigError: data: parquet files are read by pyarrow")
    assert last.endswith("pip install 'nasdeploy[parquet]'")


def features(**columns: dict[str, object]) -> dict[bytes, bytes]:
    """The schema's metadata as the datasets library writes it."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


CLASSES = {"_type": "ClassLabel", "names": ["ant", "bee", "cow", "dog"]}


@pytest.fixture
def write_parquet(coloured):
    """Writes ``rows`` of the coloured images; ``changes`` replaces columns, None drops one."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(path: Path, rows=range(40), *, metadata=None, row_group_size=7, **changes) -> Path:
        images = [{"bytes": encode(coloured[i]), "path": None} for i in rows]
        columns = {"image": images, "label": [i % 4 for i in rows]} | changes
        table = arrow.table({name: values for name, values in columns.items() if values is not None})
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=row_group_size)
        return path

    return write


def test_parquet_folder_is_read_with_its_class_names(tmp_path, write_parquet, coloured):
    metadata = features(image={"_type": "Image"}, label=CLASSES)
    for n, rows in enumerate((range(20), range(20, 40))):
        write_parquet(tmp_path / "data" / f"train-0000{n}-of-00002.parquet", rows, metadata=metadata)
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", range(8), metadata=metadata)
    write_parquet(
        tmp_path / "data" / "test-00000-of-00001-0123456789abcdef.parquet", range(4), metadata=metadata
    )
    (tmp_path / "README.md").touch()
    dataset = load(tmp_path)
    assert dataset.class_names == ("ant", "bee", "cow", "dog")
    assert np.array_equal(dataset.train.images.permute(0, 2, 3, 1).numpy(), coloured)
    assert dataset.train.labels.tolist() == [0, 1, 2, 3] * 10
    assert [len(dataset.valid), len(dataset.test)] == [8, 4]
    assert load(tmp_path / "data").fingerprint() == dataset.fingerprint()


def test_parquet_equals_npz(tmp_path, write_parquet, coloured):
    write_parquet(tmp_path / "set.parquet")
    np.savez(tmp_path / "set.npz", train_images=coloured, train_labels=np.arange(40) % 4)
    assert load(tmp_path / "set.parquet").fingerprint() == load(tmp_path / "set.npz").fingerprint()


@pytest.mark.parametrize("row_group_size", [1, 40])
def test_parquet_can_be_stored(tmp_path, write_parquet, monkeypatch, row_group_size):
    monkeypatch.setenv("NASDEPLOY_CACHE", str(tmp_path / "cache"))
    path = write_parquet(tmp_path / "set.parquet", row_group_size=row_group_size)
    stored = load(path, memory_limit=0, image_size=6)
    assert isinstance(stored.train.images, StoredImages)
    assert stored.fingerprint() == load(path, image_size=6).fingerprint()


def test_parquet_labels_may_be_text_and_images_binary(tmp_path, write_parquet, coloured):
    animals = [("cow", "ant", "bee", "dog")[i % 4] for i in range(40)]
    content = [encode(image) for image in coloured]
    write_parquet(tmp_path / "train.parquet", label=None, image=None, img=content, animal=animals)
    dataset = load(tmp_path)
    assert dataset.class_names == ("ant", "bee", "cow", "dog")
    images, labels = (torch.cat([getattr(s, name) for s in (dataset.train, dataset.valid, dataset.test)])
                      for name in ("images", "labels"))  # fmt: skip
    assert labels.tolist() == [(2, 0, 1, 3)[i % 4] for i in images[:, 0, 0, 0].tolist()]
    write_parquet(
        tmp_path / "test.parquet", range(4), label=None, image=None, img=content[:4], animal=["emu"] * 4
    )
    with pytest.raises(DataError, match="label 'emu' is not in train"):
        load(tmp_path)


def test_metadata_and_names_choose_between_columns(tmp_path, write_parquet):
    fine, coarse = [i % 4 for i in range(40)], [i % 2 for i in range(40)]
    two = {"_type": "ClassLabel", "names": ["low", "high"]}
    others = {"label": None, "thumbnail": [b"x"] * 40, "row": list(range(40))}
    path = write_parquet(
        tmp_path / "train.parquet",
        metadata=features(image={"_type": "Image"}, fine_label=CLASSES, coarse_label=two),
        fine_label=fine,
        coarse_label=coarse,
        **others,
    )
    assert load(path).class_names == ("ant", "bee", "cow", "dog")
    metadata = features(image={"_type": "Image"}, coarse_label=two)
    write_parquet(path, metadata=metadata, other=fine, coarse_label=coarse, **others)
    assert load(path).class_names == ("low", "high")
    write_parquet(
        path, metadata=features(image={"_type": "Image"}), other=fine, coarse_label=coarse, **others
    )
    with pytest.raises(DataError, match=r"3 columns \(other, coarse_label, row\) that could hold labels"):
        load(path)
    write_parquet(path, metadata=None, **others | {"label": fine})
    with pytest.raises(DataError, match=r"2 columns \(image, thumbnail\) that could hold images"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label": None},
            r"train\.parquet: no column of labels, of image; expected one \(integers or text\)",
        ),
        ({"image": None}, r"no column of images, of label; expected one"),
        ({"label": [None, *[i % 4 for i in range(39)]]}, "no 'label' in row 0; expected one in each"),
        ({"label": [-1] * 40}, "label -1 of image 0 is out of range"),
        (
            {"image": [{"bytes": None, "path": "x.png"}] * 40},
            "no image in row 0; expected its bytes, not only a path",
        ),
        (
            {"image": [{"bytes": b"no image", "path": None}] * 40},
            r"train\.parquet: row 0: not a readable image",
        ),
        ({"metadata": {b"huggingface": b"{"}}, "'huggingface' metadata is damaged"),
        ({"metadata": {b"huggingface": b'{"info": 3}'}}, "'huggingface' metadata is damaged"),
        ({"metadata": features(label=CLASSES | {"names": ["ant"]})}, r"1 class \(ant\)"),
        (
            {"metadata": {b"huggingface": b'{"info": {"features": ["label"]}}'}},
            r"'huggingface' metadata is damaged \('features' is a list, expected a dict\)",
        ),
        ({"metadata": {b"huggingface": b"null"}}, "'huggingface' metadata is damaged"),
    ],
)
def test_parquet_that_is_wrong_is_refused(tmp_path, write_parquet, changes, message):
    arrow = pytest.importorskip("pyarrow")
    if isinstance(changes.get("image"), list) and changes["image"][0]["bytes"] is None:
        kind = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
        changes = {"image": arrow.array(changes["image"], kind)}
    write_parquet(tmp_path / "train.parquet", **changes)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_parquet_whose_metadata_tells_no_features_is_read(tmp_path, write_parquet):
    for metadata in ({b"huggingface": b'{"info": {"features": null}}'}, features(label=None)):
        path = write_parquet(tmp_path / "train.parquet", metadata=metadata)
        assert load(path).class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_parquet_label_that_is_too_large_is_named(tmp_path, write_parquet, value):
    arrow = pytest.importorskip("pyarrow")
    labels = arrow.array([*[i % 4 for i in range(39)], value], arrow.uint64())
    path = write_parquet(tmp_path / "train.parquet", label=labels)
    with pytest.raises(
        DataError, match=rf"train\.parquet: 'label' is {value} in row 39; expected 0 to the number of classes"
    ):
        load(path)
    small = arrow.array([i % 4 for i in range(40)], arrow.uint64())
    assert load(write_parquet(path, label=small)).num_classes == 4


def test_parquet_text_that_is_not_utf_8_is_one_line(tmp_path, write_parquet, coloured):
    """In labels, in the paths beside the images, and in the names of columns."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    latin = arrow.array(["café".encode("latin1")] * 40, arrow.binary()).view(arrow.string())
    content = arrow.array([encode(image) for image in coloured], arrow.binary())
    images = arrow.StructArray.from_arrays([content, latin], names=["bytes", "path"])
    path = write_parquet(tmp_path / "train.parquet")
    foreign = arrow.schema([arrow.field("café".encode("latin1"), arrow.int64())])
    for write in (
        lambda: write_parquet(path, label=latin),
        lambda: write_parquet(path, image=images),
        lambda: parquet.write_table(arrow.Table.from_arrays([arrow.array([1])], schema=foreign), path),
    ):
        write()
        with pytest.raises(DataError, match=r"train\.parquet: holds text that is not UTF-8 \(") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_parquet_text_labels_are_numbered_by_the_names_of_the_metadata(tmp_path, write_parquet):
    """Whatever the order of the names, and of the labels."""
    names = ["dog", "ant", "cow", "bee"]
    metadata = features(label=CLASSES | {"names": names})
    write_parquet(tmp_path / "train.parquet", metadata=metadata, label=[names[i % 4] for i in range(40)])
    write_parquet(tmp_path / "test.parquet", range(3), metadata=metadata, label=["cow", "dog", "cow"])
    write_parquet(tmp_path / "valid.parquet", range(1), metadata=metadata, label=["bee"])
    dataset = load(tmp_path)
    assert dataset.class_names == ("dog", "ant", "cow", "bee")
    assert dataset.train.labels.tolist() == [0, 1, 2, 3] * 10
    assert (dataset.test.labels.tolist(), dataset.valid.labels.tolist()) == ([2, 0, 2], [3])
    write_parquet(tmp_path / "test.parquet", range(1), metadata=metadata, label=["emu"])
    with pytest.raises(
        DataError, match="test: label 'emu' is not among the class names of the metadata"
    ) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_parquet_labels_of_two_kinds_are_refused(tmp_path, write_parquet):
    write_parquet(tmp_path / "train.parquet")
    for labels, kind in ((["ant"] * 4, "string"), ([0.5] * 4, "double")):
        write_parquet(tmp_path / "test.parquet", range(4), label=labels)
        with pytest.raises(
            DataError, match=rf"test\.parquet: 'label' is {kind}; expected integers, as in the first file"
        ):
            load(tmp_path)


def test_parquet_files_that_do_not_fit_together_are_refused(tmp_path, write_parquet):
    train = write_parquet(tmp_path / "one" / "train-00000-of-00003.parquet")
    write_parquet(train.with_name("train-00002-of-00003.parquet"))
    with pytest.raises(DataError, match=r"one: part 1 of train-…-of-00003 is missing"):
        load(tmp_path / "one")
    write_parquet(tmp_path / "two" / "train.parquet")
    write_parquet(tmp_path / "two" / "test.parquet", range(4), label=None, klass=[0, 1, 2, 3])
    with pytest.raises(DataError, match=r"test\.parquet: no column 'label'; it has image, klass"):
        load(tmp_path / "two")
    write_parquet(tmp_path / "three" / "test.parquet")
    with pytest.raises(DataError, match=r"three: no train-\*\.parquet beside test\.parquet"):
        load(tmp_path / "three")
    write_parquet(tmp_path / "two" / "unsupervised.parquet")
    with pytest.raises(DataError, match=r"unsupervised\.parquet: not of a known part by its name"):
        load(tmp_path / "two")
    with pytest.raises(DataError, match="parquet files in one, three, two; expected one of these folders"):
        load(tmp_path)


def test_empty_and_damaged_parquet_are_refused(tmp_path, write_parquet):
    path = write_parquet(tmp_path / "train.parquet")
    content = path.read_bytes()
    for damaged in (b"", b"PAR1", content[:-50], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train\.parquet: not a readable parquet file \(.+\)"):
            load(path)
    arrow = pytest.importorskip("pyarrow")
    kind = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
    write_parquet(path, [], image=arrow.array([], kind), label=arrow.array([], arrow.int64()))
    with pytest.raises(DataError, match="no labels; expected at least one image"):
        load(path)


def test_parquet_damaged_inside_is_refused_and_hangs_nothing(tmp_path, write_parquet):
    path = write_parquet(tmp_path / "train.parquet")
    content = bytearray(path.read_bytes())
    content[4:3000] = bytes(2996)
    path.write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=r"train\.parquet"):
        load(path)


def test_images_of_one_large_row_group_are_read_a_few_at_a_time(tmp_path, rng):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table(
        {"image": [rng.bytes(100_000) for _ in range(300)], "label": [n % 2 for n in range(300)]}
    )
    parquet.write_table(table, tmp_path / "train.parquet", use_dictionary=False, write_batch_size=8)
    del table
    before = arrow.total_allocated_bytes()
    highest = 0
    for number, image in enumerate(_StoredRows([_Shard(tmp_path / "train.parquet")], "image")):
        assert image.name.endswith(f"train.parquet: row {number}")
        assert len(image.content) == 100_000
        highest = max(highest, arrow.total_allocated_bytes() - before)
    assert number == 299
    assert 0 < highest < 15_000_000
