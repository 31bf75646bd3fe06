"""Image sets larger than memory: files of decoded images, and that they equal what fits into memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nasdeploy.data import (
    Dataset,
    Split,
    StoredImages,
    image_chunks,
    load_dataset,
    make_augmentation,
    training_batches,
)
from nasdeploy.data.contents import LabelledImages, Request
from nasdeploy.data.pixels import labelled_pixels, resized_entry
from nasdeploy.data.stored import PixelFile
from nasdeploy.errors import DataError
from nasdeploy.exporters.runtime import onnx_predictions
from nasdeploy.files import cache_folder
from nasdeploy.training.evaluation import loss_and_accuracy, predict
from nasdeploy.training.recalibration import recalibrate

ROOT = Path(__file__).parents[1]
PER_CLASS = 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NASDEPLOY_CACHE", str(folder))
    return folder


@pytest.fixture
def photos(tmp_path, rng) -> Path:
    """Two classes of 20 images of about 12x12 pixels, some grey and some in colour."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            shape = (12 + i % 3, 13, 3) if i % 2 else (12, 12 + i % 3)
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i:02}.png")
    return tmp_path / "photos"


def load(path: Path, *, stored: bool = True, **options) -> Dataset:
    """Load 8x8 images: into the cache, or into memory."""
    memory_limit = 0 if stored else 2**30
    return load_dataset(str(path), **{"seed": 0, "image_size": 8, "memory_limit": memory_limit} | options)


def names(folder: Path, suffix: str) -> list[str]:
    return sorted(path.name for path in folder.glob(f"*{suffix}"))


def splits(dataset: Dataset) -> list[Split]:
    return [dataset.train, dataset.valid, dataset.test]


# ── stored images ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pair(tmp_path, rng) -> tuple[StoredImages, torch.Tensor]:
    """Thirty images in a file, and the same in memory."""
    pixels = rng.integers(0, 256, (30, 3, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    return StoredImages(PixelFile(tmp_path / "pixels.npy")), torch.from_numpy(pixels)


@pytest.mark.parametrize(
    "key", [slice(None), slice(3, 9), slice(28, 50), slice(5, 5), slice(20, 2, 5), slice(1, 20, 7)]
)
def test_slices_equal_those_of_a_tensor(pair, key):
    stored, tensor = pair
    assert torch.equal(stored[key], tensor[key])


@pytest.mark.parametrize("indices", [[], [4], [0, 1, 2, 3], [29, 0, 1, 2, 17, 18, 5, 5, 4]])
def test_indices_equal_those_of_a_tensor(pair, indices):
    stored, tensor = pair
    indices = torch.tensor(indices, dtype=torch.int64)
    assert torch.equal(stored[indices], tensor[indices])


def test_surface_is_that_of_a_tensor(pair):
    stored, tensor = pair
    for name in ("shape", "dtype", "ndim", "device"):
        assert getattr(stored, name) == getattr(tensor, name)
    assert len(stored) == len(tensor)
    assert torch.equal(torch.stack(list(stored)), tensor)
    chosen = np.array([9, 2, 3, 25])
    selected = stored.select(chosen)
    assert selected.shape == (4, 3, 4, 4)
    assert torch.equal(selected[1:4], tensor[chosen[1:4]])
    assert torch.equal(selected.select(np.array([3, 0]))[:], tensor[[25, 9]])


def test_batches_arrive_on_the_device_that_was_asked_for(pair):
    stored, _ = pair
    moved = stored.to("meta")
    assert moved.device == torch.device("meta")
    assert moved[2:7].device == torch.device("meta")
    assert moved.select(np.arange(3))[torch.tensor([0, 2])].shape == (2, 3, 4, 4)
    assert moved.to("cpu")[0:1].device == torch.device("cpu")


def test_training_batches_arrive_on_the_device_and_are_chosen_on_the_cpu(pair):
    """Indices on a device would have to be read back for every batch; those on "meta" cannot be."""
    split = Split(pair[0], torch.arange(30)).to("meta")
    augment = make_augmentation("none", (3, 4, 4))
    batches = training_batches(split, batch_size=8, generator=torch.Generator(), augment=augment)
    for _ in range(5):
        images, labels = next(batches)
        assert (images.device.type, labels.device.type) == ("meta", "meta")
        assert images.shape == (8, 3, 4, 4)


@pytest.mark.parametrize(
    "key", [torch.tensor([True] * 30), torch.tensor([1], dtype=torch.int32), torch.zeros(1, 1).long()]
)
def test_other_indices_are_refused(pair, key):
    with pytest.raises(TypeError, match=r"expected torch\.int64, 1-d"):
        pair[0][key]


def test_index_beyond_the_end_is_refused(pair):
    with pytest.raises(IndexError):
        pair[0][torch.tensor([30])]


def test_file_that_shrinks_is_named(pair, tmp_path):
    stored, _ = pair
    os.truncate(tmp_path / "pixels.npy", 500)
    with pytest.raises(DataError, match=r"pixels\.npy: has become shorter"):
        stored[:]


@pytest.mark.parametrize(
    "array", [np.zeros((3, 4, 4), np.uint8), np.zeros((3, 1, 4, 4), np.int8)], ids=["3-d", "int8"]
)
def test_other_files_are_no_pixel_files(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match="holds"):
        PixelFile(tmp_path / "x.npy")


def test_chunks_hold_every_image_once_in_order(pair):
    for images in pair:
        assert [len(chunk) for chunk in image_chunks(images, 12)] == [12, 12, 6]
        assert torch.equal(torch.cat(list(image_chunks(images, 12))), pair[1])
        assert torch.equal(torch.cat(list(image_chunks(images))), pair[1])


# ── the same dataset ─────────────────────────────────────────────────────────────────────────────


def test_stored_set_equals_the_one_in_memory(photos):
    stored, kept = load(photos), load(photos, stored=False)
    assert stored.fingerprint() == kept.fingerprint()
    assert stored.normalisation() == kept.normalisation()
    assert (stored.preprocessing, stored.class_names) == (kept.preprocessing, kept.class_names)
    for one, other in zip(splits(stored), splits(kept), strict=True):
        assert isinstance(one.images, StoredImages)
        assert isinstance(other.images, torch.Tensor)
        assert torch.equal(one.images[:], other.images)
        assert torch.equal(one.labels, other.labels)


def test_division_of_a_stored_set_depends_on_the_seed_alone(photos):
    for seed in (0, 1):
        assert load(photos, seed=seed).fingerprint() == load(photos, seed=seed, stored=False).fingerprint()
    assert load(photos).fingerprint() != load(photos, seed=1).fingerprint()


def test_given_splits_are_kept(tmp_path, photos):
    photos.rename(tmp_path / "train")
    for part, value in (("valid", 50), ("test", 60)):
        for name in ("cat", "dog"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            Image.new("L", (9, 9), value).save(tmp_path / "set" / part / name / "x.png")
    (tmp_path / "train").rename(tmp_path / "set" / "train")
    stored, kept = load(tmp_path / "set"), load(tmp_path / "set", stored=False)
    assert [len(split) for split in splits(stored)] == [40, 2, 2]
    assert stored.valid.images[:].unique().tolist() == [50]
    assert stored.test.images[:].unique().tolist() == [60]
    assert stored.fingerprint() == kept.fingerprint()


def test_grey_images_are_stored_with_one_channel(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "grey" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 10 * i).save(tmp_path / "grey" / name / f"{i}.png")
    assert load(tmp_path / "grey").image_shape == (1, 8, 8)
    assert load(tmp_path / "grey", image_size=None).image_shape == (1, 8, 8)
    # Below the limit with one channel, above it with three.
    assert isinstance(load(tmp_path / "grey", memory_limit=8 * 64).train.images, torch.Tensor)
    assert isinstance(
        load(tmp_path / "grey", memory_limit=8 * 64 - 1, image_size=7).train.images, torch.Tensor
    )


def test_training_batches_are_the_same(photos):
    batches = []
    for dataset in (load(photos), load(photos, stored=False)):
        generator = torch.Generator().manual_seed(3)
        augment = make_augmentation("light", dataset.image_shape)
        batches.append(training_batches(dataset.train, batch_size=6, generator=generator, augment=augment))
    for _ in range(10):
        (images, labels), (other_images, other_labels) = map(next, batches)
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
    state = batches[0].state_dict()
    expected = next(batches[0])
    batches[1].load_state_dict(state)
    assert torch.equal(next(batches[1])[0], expected[0])


def test_evaluation_and_recalibration_are_the_same(photos):
    results = []
    for dataset in (load(photos), load(photos, stored=False)):
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)
        for layer in (layers[0], layers[3]):
            nn.init.constant_(layer.weight, 0.01)
            nn.init.constant_(layer.bias, 0.0)
        network = nn.Sequential(*layers)
        recalibrate(network, dataset.train.images, batch_size=7)
        results.append((predict(network, dataset.valid.images, batch_size=3), layers[1].running_mean))
        loss, _ = loss_and_accuracy(network, dataset.valid.images, dataset.valid.labels)
        assert loss > 0.0
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_onnx_predictions_are_the_same(photos, tmp_path):
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    axes = helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])
    images = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 3])
    node = helper.make_node("ReduceMean", ["images", "axes"], ["logits"], keepdims=0)
    graph = helper.make_graph([node], "brightest", [images], [logits], [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "brightest.onnx")
    found = [
        onnx_predictions(tmp_path / "brightest.onnx", dataset.train.images, batch_size=5)
        for dataset in (load(photos), load(photos, stored=False))
    ]
    assert found[0].tolist() == found[1].tolist()
    assert len(set(found[0].tolist())) > 1


# ── the cache ────────────────────────────────────────────────────────────────────────────────────


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("NASDEPLOY_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("NASDEPLOY_CACHE")
    assert cache_folder() == Path("/two/nasdeploy")
    for unset in ("", "relative"):  # a relative path counts as unset [XDG base directory specification]
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == Path.home() / ".cache" / "nasdeploy"


def test_small_set_needs_no_cache(photos, cache):
    load(photos, stored=False)
    assert not cache.exists()


def test_images_are_decoded_once(photos, cache):
    shares: list[float] = []
    first = load(photos, progress=shares.append)
    assert shares == sorted(shares)
    assert (shares[0] > 0.0, shares[-1]) == (True, 1.0)
    (file,) = names(cache, ".npy")
    again: list[float] = []
    second = load(photos, progress=again.append)
    assert again == []
    assert names(cache, ".npy") == [file]
    assert first.fingerprint() == second.fingerprint()
    assert np.load(cache / file).shape == (2 * PER_CLASS, 3, 8, 8)


def test_relative_path_finds_the_same_file(photos, cache, monkeypatch):
    load(photos)
    before = names(cache, ".npy")
    monkeypatch.chdir(photos.parent)
    load(Path("photos"))
    assert names(cache, ".npy") == before


def test_every_size_has_its_own_file(photos, cache):
    load(photos)
    load(photos, image_size=10)
    assert len(names(cache, ".npy")) == 2


@pytest.mark.parametrize("change", ["content", "time", "new", "gone"])
def test_changed_folder_is_decoded_again_and_replaces_its_file(photos, cache, change):
    before, file = load(photos), names(cache, ".npy")
    image = photos / "cat" / "03.png"
    if change == "content":
        time = image.stat().st_mtime_ns
        Image.new("RGB", (12, 12), (1, 2, 3)).save(image)
        os.utime(image, ns=(time, time))
    elif change == "time":
        os.utime(image, ns=(1, image.stat().st_mtime_ns + 1))
    elif change == "new":
        Image.new("RGB", (12, 12), (1, 2, 3)).save(photos / "cat" / "new.png")
    else:
        image.unlink()
    after = load(photos)
    assert len(names(cache, ".npy")) == 1
    assert names(cache, ".npy") != file
    assert after.fingerprint() == load(photos, stored=False).fingerprint()
    assert before.train.images[:].shape == (28, 3, 8, 8)  # who read the old file reads on


def test_damaged_file_is_made_again(photos, cache):
    expected = load(photos).fingerprint()
    (file,) = cache.glob("*.npy")
    for content in (b"", file.read_bytes()[:-1], b"x" * 5000):
        file.write_bytes(content)
        assert load(photos).fingerprint() == expected


@pytest.mark.parametrize("reason", ["is a file", "has a file above"])
def test_cache_that_cannot_be_written_is_named_in_one_line(photos, tmp_path, monkeypatch, reason):
    (tmp_path / "taken").write_text("")
    folder = tmp_path / "taken" / ("" if reason == "is a file" else "inner")
    monkeypatch.setenv("NASDEPLOY_CACHE", str(folder))
    with pytest.raises(
        DataError, match=r"taken.*: cannot hold the decoded images, .* NASDEPLOY_CACHE"
    ) as caught:
        load(photos)
    assert "\n" not in str(caught.value)


CHILD = """
import resource, os, signal, sys
from nasdeploy.data import load_dataset
def progress(share):
    if share > {share}:
        {action}
load_dataset(sys.argv[1], seed=0, image_size=8, memory_limit=0, progress=progress)
"""


def run_child(
    photos: Path, action: str, *, share: float, before: str = ""
) -> subprocess.CompletedProcess[str]:
    code = CHILD.format(action=action, share=share).replace("def progress", f"{before}\ndef progress")
    return subprocess.run(
        [sys.executable, "-c", code, str(photos)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_full_disk_is_told_before_anything_is_decoded(photos, cache):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    done = run_child(photos, "raise AssertionError('decoded')", share=0.15, before=limit)
    assert "DataError" in done.stderr
    assert (
        f"{cache}: cannot hold the decoded images, 0.0 GiB (File too large); free the space, or set"
        in done.stderr
    )
    assert names(cache, ".npy") + names(cache, ".part") == []


def test_killed_decoding_leaves_nothing_that_is_taken_for_good(photos, cache):
    done = run_child(photos, "os.kill(os.getpid(), signal.SIGKILL)", share=0.5)
    assert done.returncode == -signal.SIGKILL
    assert names(cache, ".npy") == []
    assert len(names(cache, ".part")) == 1
    assert load(photos).fingerprint() == load(photos, stored=False).fingerprint()
    assert names(cache, ".part") == []


def test_leftovers_of_other_sets_are_removed_and_work_in_progress_is_not(photos, cache):
    cache.mkdir()
    for name in ("dead", "alive"):
        (cache / f"{name}.part").touch()
    with filelock.FileLock(cache / "alive.lock"):
        load(photos)
    assert names(cache, ".part") == ["alive.part"]


def test_interruption_ends_the_decoding_and_removes_its_file(photos, cache):
    def interrupt(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(photos, progress=interrupt)
    assert names(cache, ".npy") + names(cache, ".part") == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("ThreadPool")] == []


def test_damaged_image_is_named_and_leaves_no_file(photos, cache):
    damaged = photos / "dog" / "07.png"
    damaged.write_bytes(damaged.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"dog/07\.png: not a readable image"):
        load(photos)
    assert names(cache, ".npy") + names(cache, ".part") == []


def test_unequal_sizes_are_told_before_anything_is_stored(photos, cache):
    with pytest.raises(
        DataError, match=r"cat/00\.png is 12x12 pixels but .*cat/01\.png is 13x13; .* --image-size 12"
    ):
        load(photos, image_size=None)
    assert not cache.exists()


def test_set_that_another_process_decodes_is_awaited_and_taken_from_it(photos, cache):
    expected = load(photos).fingerprint()
    (file,) = cache.glob("*.npy")
    file.rename(cache / "aside")
    shares: list[float] = []
    found: list[str] = []
    with filelock.FileLock(file.with_suffix(".lock")):
        waiting = threading.Thread(
            target=lambda: found.append(load(photos, progress=shares.append).fingerprint())
        )
        waiting.start()
        waiting.join(timeout=1.0)
        assert waiting.is_alive()
        (cache / "aside").rename(file)
    waiting.join(timeout=30.0)
    assert found == [expected]
    assert max(shares) == pytest.approx(0.1)  # the headers, and no image


# ── sets of pixels that are resized ──────────────────────────────────────────────────────────────


def write_pixel_npz(folder: Path, *, seed: int = 0) -> Path:
    """Write 30 RGB images, 6x7 pixels, and 6 for test, of 3 classes."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, count in (("train", 30), ("test", 6)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 6, 7, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count) % 3
    folder.mkdir(exist_ok=True)
    np.savez(folder / "set.npz", **arrays)
    return folder / "set.npz"


def write_cifar(folder: Path) -> Path:
    """Write two batches and a test batch of the binary version, 12 images each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        records = rng.integers(0, 256, (12, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(12) % 3
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def write_idx(folder: Path) -> Path:
    """Write 30 grey images and 6 for test."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 6)):
        images = rng.integers(0, 256, (count, 10, 10), dtype=np.uint8)
        labels = (np.arange(count) % 3).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    return folder


@pytest.mark.parametrize("write", [write_pixel_npz, write_cifar, write_idx])
def test_resized_pixels_beyond_the_limit_are_stored_and_the_same(tmp_path, cache, write):
    path = write(tmp_path / "set")
    kept = load(path, stored=False)
    assert not cache.exists()
    stored = load(path)
    assert [type(split.images) for split in splits(stored)] == [StoredImages] * 3
    assert [type(split.images) for split in splits(kept)] == [torch.Tensor] * 3
    assert stored.fingerprint() == kept.fingerprint()
    assert stored.normalisation() == kept.normalisation()
    assert [len(split) for split in splits(stored)] == [len(split) for split in splits(kept)]
    assert len(names(cache, ".npy")) == 2  # train and test: valid is a part of train


def test_limit_counts_the_resized_pixels_of_all_parts(tmp_path, cache):
    path = write_pixel_npz(tmp_path / "set")
    num_bytes = 36 * 3 * 8 * 8
    assert isinstance(load(path, memory_limit=num_bytes).test.images, torch.Tensor)
    assert not cache.exists()
    assert isinstance(load(path, memory_limit=num_bytes - 1).test.images, StoredImages)


def test_pixels_that_have_their_size_are_not_stored(tmp_path, cache):
    path = write_cifar(tmp_path / "set")
    one, two = load(path, image_size=None), load(path, image_size=32)
    assert isinstance(one.train.images, torch.Tensor)
    assert one.fingerprint() == two.fingerprint()
    assert not cache.exists()


def test_pixels_are_resized_as_image_files_are(tmp_path):
    path = write_pixel_npz(tmp_path / "set")
    with np.load(path) as archive:
        images, labels = archive["train_images"], archive["train_labels"]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "files" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "files" / str(label) / f"{number:02}.png")
    np.savez(path, train_images=images, train_labels=labels)
    found = [
        {image.numpy().tobytes() for split in splits(load(p, stored=False)) for image in split.images}
        for p in (path, tmp_path / "files")
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 30


def test_pixels_are_resized_once(tmp_path, cache):
    path = write_pixel_npz(tmp_path / "set")
    shares: list[float] = []
    first = load(path, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[0] > 0.0
    assert shares[-1] == pytest.approx(1.0)
    files = names(cache, ".npy")
    again: list[float] = []
    assert load(path, progress=again.append).fingerprint() == first.fingerprint()
    assert (again, names(cache, ".npy")) == ([], files)
    load(path, image_size=9)
    assert len(names(cache, ".npy")) == 4


def test_changed_pixels_are_resized_again_and_replace_their_files(tmp_path, cache):
    path = write_pixel_npz(tmp_path / "set")
    before, files = load(path), names(cache, ".npy")
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    write_pixel_npz(tmp_path / "set", seed=1)
    os.utime(path, ns=(time, time + 1))
    after = load(path)
    assert path.stat().st_size == size
    assert len(names(cache, ".npy")) == 2
    assert not set(names(cache, ".npy")) & set(files)
    assert after.fingerprint() == load(path, stored=False).fingerprint() != before.fingerprint()


def test_pixels_that_change_while_they_are_read_are_not_taken_for_the_new_ones(tmp_path):
    """The place is that of the file as it was before it was read."""
    path = write_pixel_npz(tmp_path / "set")
    request = Request(path=path, image_size=8, memory_limit=0)
    entry = resized_entry(request, [path])
    with np.load(path) as archive:
        old = LabelledImages(images=archive["train_images"], labels=archive["train_labels"])
    write_pixel_npz(tmp_path / "set", seed=1)
    os.utime(path, ns=(1, 1))
    labelled_pixels({"train": old}, where={}, request=request, entry=entry)
    assert load(path).fingerprint() == load(path, stored=False).fingerprint()


@pytest.mark.parametrize(("memory_limit", "most"), [(2**30, 1.5), (0, 0.75)], ids=["memory", "stored"])
def test_resizing_needs_no_second_copy(tmp_path, memory_limit, most):
    (tmp_path / "x.npz").touch()
    request = Request(path=tmp_path / "x.npz", image_size=32, memory_limit=memory_limit)
    entry = resized_entry(request, [request.path])
    parts = {
        "train": LabelledImages(images=np.ones((4000, 4, 4, 1), np.uint8), labels=np.zeros(4000, np.int64))
    }
    tracemalloc.start()
    try:
        sized = labelled_pixels(parts, where={}, request=request, entry=entry)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sized["train"].images.shape == (4000, 1, 32, 32)
    assert peak < most * 4000 * 32 * 32
