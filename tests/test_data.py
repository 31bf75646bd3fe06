"""Image sets: the embedded one, .npz files, folders, their splits, batches and accuracies."""

from __future__ import annotations

import gzip
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from nasdeploy.data import (
    Dataset,
    Split,
    accuracy_metrics,
    class_weights,
    dataset_names,
    is_unbalanced,
    load_dataset,
    make_augmentation,
    training_batches,
)
from nasdeploy.data.assembly import stratified_division
from nasdeploy.data.embedded import FASHION_MNIST
from nasdeploy.errors import ConfigError, DataError, RunFolderError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fashion() -> Dataset:
    return load_dataset("fashion-mnist", seed=0)


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The script that makes the embedded file."""
    spec = importlib.util.spec_from_file_location(
        "make_embedded", ROOT / "examples/make_embedded_fashion_mnist.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_image(path: Path, *, size=(8, 8), mode="L", value=0, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)


def write_folder(root: Path, *, part="", classes=("cat", "dog"), count=10, **options) -> Path:
    """Write ``count`` images a class; pixel value = 10 * class + image, unique up to 10 images."""
    for c, name in enumerate(classes):
        for i in range(count):
            write_image(root / part / name / f"{i:02}.png", value=10 * c + i, **options)
    return root


def write_npz(path: Path, rng: np.random.Generator, **changes) -> Path:
    """Write 3 classes of 20 training and 5 test images, 8x8; ``changes`` replaces members, None drops one."""
    members = {
        "train_images": rng.integers(0, 256, (60, 8, 8), dtype=np.uint8),
        "train_labels": np.arange(60) % 3,
        "test_images": rng.integers(0, 256, (15, 8, 8), dtype=np.uint8),
        "test_labels": np.arange(15) % 3,
    }
    members |= changes
    np.savez(path, **{key: array for key, array in members.items() if array is not None})
    return path


def load(path: Path, **options) -> Dataset:
    return load_dataset(str(path), **{"seed": 0} | options)


def values(split: Split) -> set[int]:
    """The first pixel of every image of :func:`write_folder`."""
    return set(split.images[:, 0, 0, 0].tolist())


# ── the embedded set ─────────────────────────────────────────────────────────────────────────────


def test_embedded_set_is_balanced_and_grey(fashion):
    assert fashion.image_shape == (1, 28, 28)
    assert [len(s) for s in (fashion.train, fashion.valid, fashion.test)] == [8500, 1500, 2000]
    for split, per_class in ((fashion.train, 850), (fashion.valid, 150), (fashion.test, 200)):
        assert torch.bincount(split.labels).tolist() == [per_class] * 10
    assert fashion.class_names[0] == "T-shirt/top"
    assert fashion.class_names[9] == "Ankle boot"


def test_embedded_images_are_all_different(fashion):
    images = torch.cat([fashion.train.images, fashion.valid.images, fashion.test.images])
    assert len({image.numpy().tobytes() for image in images}) == 12_000


def test_embedded_file_is_small_and_has_its_licence():
    assert FASHION_MNIST.stat().st_size <= 6_000_000
    licence = FASHION_MNIST.with_name("LICENSE.fashion-mnist").read_text()
    assert "Copyright (c) 2017 Zalando SE" in licence
    assert "Permission is hereby granted, free of charge" in licence


def test_script_reproduces_the_embedded_file(maker, tmp_path):
    original = os.environ.get("NASDEPLOY_FASHION_MNIST")
    if not original:
        pytest.skip("NASDEPLOY_FASHION_MNIST does not name the original Fashion-MNIST")
    maker.main([original, "--out", str(tmp_path / "made.npz")])
    assert (tmp_path / "made.npz").read_bytes() == FASHION_MNIST.read_bytes()


def test_script_makes_the_same_file_from_idx_and_from_npz(maker, tmp_path):
    members = {}
    for part, prefix, count in (("train", "train", 10_000), ("test", "t10k", 2_000)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0] = np.arange(count) % 256
        members |= {f"{part}_images": images, f"{part}_labels": labels.astype(np.int64)}
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            path = tmp_path / f"{prefix}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))
    np.savez(tmp_path / "original.npz", **members)
    for original, out in ((tmp_path, "a.npz"), (tmp_path / "original.npz", "b.npz")):
        maker.main([str(original), "--out", str(tmp_path / out)])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    dataset = load(tmp_path / "a.npz")
    assert torch.bincount(dataset.test.labels).tolist() == [200] * 10


# ── names and sources ────────────────────────────────────────────────────────────────────────────


def test_importing_the_package_imports_no_library_that_reads_images():
    code = "import sys, nasdeploy.data; print({'PIL', 'torchvision', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_embedded_set_is_loaded_without_pillow():
    code = (
        "import sys; from nasdeploy.data import load_dataset; load_dataset('fashion-mnist', seed=0);"
        "print({'PIL', 'torchvision', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_unknown_source_names_the_known_ones(tmp_path):
    with pytest.raises(DataError, match=r"'fashion-mnits' not found; .* fashion-mnist"):
        load_dataset("fashion-mnits", seed=0)
    (tmp_path / "set.csv").touch()
    (tmp_path / "flat").mkdir()
    write_image(tmp_path / "flat" / "x.png")
    for name, kind in (("set.csv", "a file"), ("flat", "a folder")):
        with pytest.raises(
            DataError, match=rf"{name}' is {kind} of no known layout; .*\.npz.*IDX.*class folders"
        ):
            load(tmp_path / name)


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A folder with a module ``signs`` and a package metadata that declares its functions as datasets."""
    (tmp_path / "signs.py").write_text(LOADERS)
    (tmp_path / "signs-1.dist-info").mkdir()
    (tmp_path / "signs-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: signs\nVersion: 1\n"
    )
    points = "[nasdeploy.datasets]\nsigns = signs:load\nlist = signs:wrong\n"
    (tmp_path / "signs-1.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


LOADERS = """
import numpy as np
from nasdeploy.data import Dataset, LabelledImages, assemble_dataset

def load(*, image_size: int | None, seed: int, valid_fraction: float) -> Dataset:
    labels = np.arange(40) % 2
    images = np.full((40, image_size or 8, image_size or 8, 1), 7, np.uint8)
    images.flags.writeable = False
    train = LabelledImages(images=images, labels=labels)
    return assemble_dataset(name="signs", source="signs", class_names=["a", "b"], train=train, seed=seed,
                            valid_fraction=valid_fraction)

def wrong(*, image_size, seed, valid_fraction):
    return [image_size]

def failing(*, image_size, seed, valid_fraction):
    raise KeyError("no such column")

constant = 3
"""


def test_dataset_of_an_installed_package_is_loaded_by_name(installed):
    assert dataset_names() == ("fashion-mnist", "signs", "list")
    dataset = load_dataset("signs", seed=0, image_size=12)
    assert (dataset.name, dataset.image_shape, len(dataset.train)) == ("signs", (1, 12, 12), 28)
    with pytest.raises(
        DataError, match=r"dataset: list returned a list; expected a nasdeploy\.data\.Dataset"
    ):
        load_dataset("list", seed=0)


def test_installed_dataset_with_a_taken_name_is_refused(installed):
    points = "[nasdeploy.datasets]\nfashion-mnist = signs:load\n"
    (installed / "signs-1.dist-info" / "entry_points.txt").write_text(points)
    with pytest.raises(
        ConfigError, match="'fashion-mnist' is defined twice: by nasdeploy itself and by signs:load"
    ):
        dataset_names()


def test_dataset_of_a_python_file_is_loaded(tmp_path):
    (tmp_path / "mine.py").write_text(LOADERS)
    dataset = load_dataset(f"{tmp_path}/mine.py:load", seed=0, valid_fraction=0.2)
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [28, 6, 6]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("wrong", DataError, r"mine\.py:wrong returned a list; expected a nasdeploy\.data\.Dataset"),
        ("failing", ConfigError, r"mine\.py:failing failed: KeyError: .*no such column"),
        ("constant", ConfigError, r"mine\.py:constant is a int; expected a function"),
        ("absent", ConfigError, r"defines no 'absent'"),
    ],
)
def test_wrong_dataset_of_a_python_file_is_refused_in_one_line(tmp_path, name, error, message):
    (tmp_path / "mine.py").write_text(LOADERS)
    with pytest.raises(error, match=message) as caught:
        load_dataset(f"{tmp_path}/mine.py:{name}", seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"image_size": 0}, {"valid_fraction": 0.0}, {"valid_fraction": 1.0}])
def test_wrong_arguments_are_configuration_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_dataset("fashion-mnist", seed=0, **options)


# ── .npz ─────────────────────────────────────────────────────────────────────────────────────────


def test_npz_without_names_counts_its_classes(tmp_path, rng):
    dataset = load(write_npz(tmp_path / "set.npz", rng))
    assert (dataset.name, dataset.class_names, dataset.image_shape) == ("set", ("0", "1", "2"), (1, 8, 8))
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [51, 9, 15]
    assert dataset.preprocessing.to_dict() == {
        "image_size": 8,
        "channels": 1,
        "colour": "grey",
        "resize": "shorter side, bilinear, antialias",
        "crop": "centre",
    }


def test_npz_pixels_stay_with_their_labels(tmp_path, rng):
    images = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(60) % 3
    dataset = load(
        write_npz(tmp_path / "set.npz", rng, train_images=images, test_images=None, test_labels=None)
    )
    assert dataset.image_shape == (3, 8, 8)
    for split in (dataset.train, dataset.valid, dataset.test):
        assert torch.equal(split.images[:, 0, 0, 0].long(), split.labels)
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [42, 9, 9]


def test_npz_with_valid_keeps_all_of_train(tmp_path, rng):
    images = rng.integers(0, 256, (3, 8, 8), dtype=np.uint8)
    path = write_npz(tmp_path / "set.npz", rng, valid_images=images, valid_labels=np.arange(3))
    dataset = load(path)
    assert len(dataset.train) == 60
    assert np.array_equal(dataset.valid.images[:, 0].numpy(), images)


def test_npz_images_are_resized_on_request(tmp_path, rng):
    images = np.full((60, 12, 8), 7, np.uint8)
    path = write_npz(tmp_path / "set.npz", rng, train_images=images, test_images=images[:15])
    with pytest.raises(DataError, match=r"'train_images' are 12x8 pixels; .* --image-size 8"):
        load(path)
    dataset = load(path, image_size=4)
    assert dataset.image_shape == (1, 4, 4)
    assert bool((dataset.train.images == 7).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": None}, "no key 'train_labels'; it holds test_images, test_labels, train_images"),
        ({"test_labels": None}, "no key 'test_labels'"),
        ({"val_images": np.zeros(1)}, "no key 'val_labels'"),
        ({"tset_images": np.zeros(1)}, "unexpected key 'tset_images'"),
        ({"valid_images": np.zeros(1), "val_labels": np.zeros(1)}, "no key 'valid_labels'"),
        ({"train_images": np.zeros((60, 8, 8))}, "'train_images' is float64 of shape"),
        ({"train_images": np.zeros((60, 8, 8, 2), np.uint8)}, r"shape \(60, 8, 8, 2\); expected uint8"),
        ({"train_images": np.zeros((0, 8, 8), np.uint8)}, r"shape \(0, 8, 8\); expected uint8"),
        ({"train_labels": np.zeros(59, np.int64)}, r"'train_labels' is int64 of shape \(59,\); expected"),
        ({"train_labels": np.zeros(60)}, "'train_labels' is float64"),
        ({"train_labels": np.arange(60) % 3 - 1}, "label -1 of image 0 is out of range"),
        ({"train_labels": np.full(60, 10**12)}, "label 1000000000000 of image 0 is out of range"),
        ({"train_labels": np.arange(60) % 2 * 2}, "class '1' has 0 training images"),
        ({"train_labels": np.zeros(60, np.int64)}, r"1 class \(0\); expected at least 2"),
        ({"test_labels": np.full(15, 3)}, "test: label 3 of image 0 is out of range; expected 0 to 2"),
        ({"class_names": np.array(["a", "b"])}, "train: label 2 of image 2 is out of range; expected 0 to 1"),
        ({"class_names": np.array(["a", "b", "a"])}, "class name 'a' occurs more than once"),
        ({"class_names": np.arange(3)}, "'class_names' is int64"),
        (
            {"test_images": np.zeros((15, 9, 9), np.uint8)},
            r"test: images of \(9, 9, 1\); expected \(8, 8, 1\)",
        ),
        ({"train_labels": np.array([{}] * 60)}, "'train_labels' holds pickled objects"),
    ],
)
def test_npz_that_is_wrong_is_refused_in_one_line(tmp_path, rng, changes, message):
    path = write_npz(tmp_path / "set.npz", rng, **changes)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_npz_is_refused(tmp_path, rng):
    whole = write_npz(tmp_path / "set.npz", rng).read_bytes()
    for name, content in (
        ("cut", whole[:3000]),
        ("empty", b""),
        ("flipped", whole[:500] + b"xyz" + whole[503:]),
    ):
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.npz: not a readable \.npz file"):
            load(tmp_path / f"{name}.npz")


# ── folders ──────────────────────────────────────────────────────────────────────────────────────


def test_folder_of_classes_is_divided_by_class(tmp_path):
    dataset = load(write_folder(tmp_path / "pets", count=20))
    assert (dataset.name, dataset.class_names) == ("pets", ("cat", "dog"))
    for split, per_class in ((dataset.train, 14), (dataset.valid, 3), (dataset.test, 3)):
        assert torch.bincount(split.labels).tolist() == [per_class] * 2


def test_division_depends_on_the_seed_alone(tmp_path):
    root = write_folder(tmp_path)
    assert load(root).fingerprint() == load(root).fingerprint()
    assert load(root).fingerprint() != load(root, seed=1).fingerprint()


@pytest.mark.parametrize("valid", ["valid", "val"])
def test_folder_with_all_splits_is_taken_as_it_is(tmp_path, valid):
    write_folder(tmp_path, part="train", count=3)
    write_folder(tmp_path, part=valid, count=2)
    write_folder(tmp_path, part="test", classes=("dog",), count=1)
    dataset = load(tmp_path)
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [6, 4, 1]
    assert dataset.test.labels.tolist() == [1]
    assert values(dataset.train) == {0, 1, 2, 10, 11, 12}


def test_folder_without_test_takes_it_from_train(tmp_path):
    write_folder(tmp_path, part="train")
    dataset = load(tmp_path)
    splits = [values(split) for split in (dataset.train, dataset.valid, dataset.test)]
    assert [len(split) for split in splits] == [14, 2, 4]  # of 10 a class: 2 for test, then 1 of 8 for valid
    assert set.union(*splits) == set(range(20))


def test_clutter_is_passed_over_and_deeper_folders_are_read(tmp_path):
    root = write_folder(tmp_path)
    write_image(root / "cat" / "more" / "x.PNG", value=99)
    (root / ".cache").mkdir()
    (root / "cat" / ".DS_Store").touch()
    (root / "cat" / "Thumbs.db").touch()
    dataset = load(root)
    assert sum(len(s) for s in (dataset.train, dataset.valid, dataset.test)) == 21


def test_one_colour_image_makes_all_rgb(tmp_path):
    root = write_folder(tmp_path)
    assert load(root).preprocessing.colour == "grey"
    write_image(root / "cat" / "red.png", mode="RGB", value=(200, 0, 0))
    dataset = load(root)
    assert (dataset.image_shape, dataset.preprocessing.colour) == ((3, 8, 8), "rgb")
    images = torch.cat([dataset.train.images, dataset.valid.images, dataset.test.images])
    grey = images[(images[:, 0] == images[:, 1]).all(dim=(1, 2))]
    assert len(grey) == 20
    assert torch.equal(grey[:, 0], grey[:, 2])


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    root = write_folder(tmp_path)
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode).save(root / "cat" / f"x.{suffix}")
    assert load(root).image_shape == (3, 8, 8)


def test_transparent_palette_is_read_without_a_warning(tmp_path):
    root = write_folder(tmp_path)
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.save(root / "cat" / "x.png", transparency=b"\x00\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load(root)
    pixels = torch.cat([s.images for s in (dataset.train, dataset.valid, dataset.test)])[:, :, 0, 0]
    assert [9, 8, 7] in pixels.tolist()


def test_exif_orientation_is_applied(tmp_path):
    root = write_folder(tmp_path)
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.save(root / "cat" / "x.png", exif=exif)
    dataset = load(root)
    images = torch.cat([s.images for s in (dataset.train, dataset.valid, dataset.test)])[:, 0]
    (turned,) = [image for image in images if int(image.max()) == 255]
    assert (int(turned[0, 0]), int(turned[7, 0])) == (0, 255)


@pytest.mark.parametrize("size", [(50, 40), (37, 91), (20, 20), (24, 31)])
def test_resizing_equals_torchvision_resize_and_centre_crop(tmp_path, rng, size):
    from torchvision.transforms import v2

    root = write_folder(tmp_path, mode="RGB", size=(24, 24), part="train")
    write_folder(tmp_path, mode="RGB", size=(24, 24), part="valid", count=1)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    (root / "test" / "cat").mkdir(parents=True)
    image.save(root / "test" / "cat" / "x.png")
    expected = v2.functional.pil_to_tensor(v2.CenterCrop(24)(v2.Resize(24)(image)))
    assert torch.equal(load(root, image_size=24).test.images[0], expected)


def test_unequal_sizes_without_image_size_name_two_files(tmp_path):
    root = write_folder(tmp_path)
    write_image(root / "dog" / "large.png", size=(12, 9))
    message = r"00\.png is 8x8 pixels but .*large\.png is 12x9; .* --image-size 8 resizes"
    with pytest.raises(DataError, match=message):
        load(root)
    assert load(root, image_size=8).image_shape == (1, 8, 8)


def test_equal_sizes_that_are_not_square_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"00\.png is 200x100 pixels, as are all; .* --image-size 100"):
        load(write_folder(tmp_path, size=(200, 100)))


@pytest.mark.parametrize(("size", "proposed"), [((230, 20), 20), ((300, 224), 224), ((300, 260), 224)])
def test_size_that_is_proposed_is_the_shorter_side_but_not_above_224(tmp_path, rng, size, proposed):
    pixels = {"train_images": np.zeros((60, *size), np.uint8), "test_images": np.zeros((15, *size), np.uint8)}
    folder = write_folder(tmp_path / "files", size=size, count=4)
    for path in (folder, write_npz(tmp_path / "set.npz", rng, **pixels)):
        with pytest.raises(DataError, match=rf"--image-size {proposed} resizes and crops them"):
            load(path)


@pytest.mark.parametrize("image_size", [None, 8])
def test_corrupt_image_is_named(tmp_path, image_size):
    root = write_folder(tmp_path)
    content = (root / "dog" / "03.png").read_bytes()
    for damaged in (b"", b"no image", content[:50], content[:45] + b"xxxx" + content[49:]):
        (root / "dog" / "03.png").write_bytes(damaged)
        with pytest.raises(DataError, match=r"03\.png: not a readable image \(.+\)") as caught:
            load(root, image_size=image_size)
        assert "\n" not in str(caught.value)


def test_sixteen_bit_image_is_refused(tmp_path):
    root = write_folder(tmp_path)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(root / "cat" / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: mode I.* has over 8 bits a channel"):
        load(root)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("train/bird/", r"bird: no images in this class folder"),
        ("test/bird/x.png", r"test/bird: class 'bird' is not in train"),
        ("val/cat/x.png", r"has both valid and val"),
        ("testing/cat/x.png", r"testing: unexpected folder beside train"),
        ("train/cat/notes.txt", r"notes\.txt: not an image by its suffix"),
    ],
)
def test_folder_that_is_wrong_is_refused(tmp_path, extra, message):
    write_folder(tmp_path, part="train")
    write_folder(tmp_path, part="valid")
    write_folder(tmp_path, part="test")
    if extra.endswith("/"):
        (tmp_path / extra).mkdir()
    else:
        write_image(tmp_path / extra, format="PNG")
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_too_few_classes_or_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="no known layout"):
        load(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train: no class folders"):
        load(tmp_path)
    (tmp_path / "train").rmdir()
    with pytest.raises(DataError, match=r"1 class \(cat\)"):
        load(write_folder(tmp_path / "one", classes=("cat",)))
    root = write_folder(tmp_path / "few", count=2)
    with pytest.raises(DataError, match="class 'cat' has 2 training images; expected at least 3"):
        load(root)
    write_folder(root / "both", part="test", count=1)
    with pytest.raises(DataError, match="has test but no train"):
        load(root / "both")


# ── types ────────────────────────────────────────────────────────────────────────────────────────


def test_normalisation_is_that_of_the_train_split(fashion):
    pixels = fashion.train.images.double()
    statistics = fashion.normalisation()
    assert statistics.mean == pytest.approx((float(pixels.mean()),), rel=1e-9)
    assert statistics.std == pytest.approx((float(pixels.std(correction=0)),), rel=1e-9)


def test_normalisation_is_per_channel_and_never_zero(tmp_path, rng):
    images = rng.integers(0, 17, (60, 8, 8, 3), dtype=np.uint8)
    images[..., 1] = 5
    dataset = load(
        write_npz(tmp_path / "set.npz", rng, train_images=images, test_images=None, test_labels=None)
    )
    statistics = dataset.normalisation()
    train = dataset.train.images.double()
    assert statistics.mean == pytest.approx(train.mean(dim=(0, 2, 3)).tolist())
    assert statistics.std[1] == 0.1
    assert statistics.std[2] == pytest.approx(float(train[:, 2].std(correction=0)))


def test_fingerprint_sees_pixels_labels_and_names(tmp_path, rng):
    names = np.array(["a", "b", "c"])
    images = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    changed = images.copy()
    changed[59, 7, 7] ^= 1
    labels = np.arange(60) % 3
    variants = [
        {},
        {"train_images": changed},
        {"train_labels": np.roll(labels, 1)},
        {"class_names": names[::-1]},
    ]
    seen = []
    for variant in variants:
        members = {"train_images": images, "train_labels": labels, "class_names": names} | variant
        path = write_npz(tmp_path / "set.npz", np.random.default_rng(1), **members)
        seen.append(load(path).fingerprint())
    assert len(set(seen)) == 4
    assert all(len(fingerprint) == 16 for fingerprint in seen)


def test_split_of_wrong_type_or_shape_is_refused():
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    assert len(Split(images, labels).to("cpu")) == 4
    with pytest.raises(DataError, match=r"images: torch\.float32 of shape \(4, 1, 8, 8\)"):
        Split(images.float(), labels)
    with pytest.raises(DataError, match=r"labels: .*expected torch\.int64 of shape \(4,\)"):
        Split(images, labels[:3])


def test_division_takes_the_share_of_every_class(rng):
    labels = np.repeat([0, 1, 2], [100, 10, 2])
    stays, taken = stratified_division(labels, 0.15, rng)
    assert np.bincount(labels[taken]).tolist() == [15, 2, 1]
    assert sorted([*stays, *taken]) == list(range(112))


# ── batches ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def numbered() -> Split:
    """Ten RGB images; image i is filled with i and has label i."""
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 3, 8, 8).contiguous()
    return Split(images, torch.arange(10))


def make_batches(split: Split, *, batch_size=4, seed=0, augmentation="none"):
    generator = torch.Generator().manual_seed(seed)
    augment = make_augmentation(augmentation, (3, 8, 8))
    return training_batches(split, batch_size=batch_size, generator=generator, augment=augment)


def test_training_batch_is_float_channels_last_with_its_labels(numbered):
    images, labels = next(make_batches(numbered))
    assert (images.dtype, images.shape) == (torch.float32, (4, 3, 8, 8))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_every_epoch_is_a_new_order_without_repetition(numbered):
    batches = make_batches(numbered)
    epochs = [torch.cat([next(batches)[1], next(batches)[1]]).tolist() for _ in range(3)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_split_smaller_than_a_batch_is_used_whole(numbered):
    batches = make_batches(numbered, batch_size=64)
    for _ in range(2):
        assert sorted(next(batches)[1].tolist()) == list(range(10))


@pytest.mark.parametrize("consumed", [0, 1, 2, 5])
def test_batches_continue_from_their_state(numbered, consumed):
    first = make_batches(numbered, augmentation="standard")
    for _ in range(consumed):
        next(first)
    state = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    expected = [next(first) for _ in range(4)]
    second = make_batches(numbered, seed=99, augmentation="standard")
    second.load_state_dict(state)
    for images, labels in expected:
        again, labels_again = next(second)
        assert torch.equal(labels, labels_again)
        assert torch.equal(images, again)


def test_state_of_another_split_is_refused(numbered):
    batches = make_batches(numbered)
    next(batches)
    smaller = make_batches(Split(numbered.images[:7], numbered.labels[:7]))
    with pytest.raises(RunFolderError, match="of 10 images; expected 7"):
        smaller.load_state_dict(batches.state_dict())


def test_batch_size_below_one_is_refused(numbered):
    with pytest.raises(ConfigError, match="batch_size = 0"):
        make_batches(numbered, batch_size=0)


# ── accuracy ─────────────────────────────────────────────────────────────────────────────────────


def test_accuracies_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1])
    predictions = np.array([0, 0, 0, 1, 1, 2])
    accuracy = accuracy_metrics(predictions, labels, num_classes=3)
    assert accuracy.top1 == pytest.approx(4 / 6)
    assert accuracy.per_class == (0.75, 0.5, None)
    assert accuracy.macro == 0.625


@pytest.mark.parametrize(("labels", "message"), [([], "n > 0"), ([0], "shape"), ([0, 3], "expected 0 to 2")])
def test_accuracy_of_unusable_labels_is_refused(labels, message):
    predictions = np.zeros(0 if not labels else 2, np.int64)
    with pytest.raises(DataError, match=message):
        accuracy_metrics(predictions, np.array(labels, np.int64), num_classes=3)


def test_class_weights_by_hand():
    labels = np.array([0, 0, 0, 1, 3, 3])
    weights = class_weights(labels, 4)
    assert weights.dtype == np.float32
    assert weights.tolist() == pytest.approx([6 / (3 * 3), 6 / (3 * 1), 0.0, 6 / (3 * 2)])
    assert weights[labels].mean() == pytest.approx(1.0)
    assert class_weights(np.arange(12) % 4, 4).tolist() == [1.0] * 4


@pytest.mark.parametrize("labels", [[], [-1, 0], [0, 2], [[0, 1]]])
def test_class_weights_of_unusable_labels_are_refused(labels):
    with pytest.raises(
        DataError, match=r"class weights: labels of shape .*; expected \(n,\) with n > 0, all of 0 to 1"
    ):
        class_weights(np.array(labels, np.int64), 2)


def test_unbalanced_means_over_one_and_a_half_times():
    assert not is_unbalanced(np.repeat([0, 1], [15, 10]))
    assert is_unbalanced(np.repeat([0, 1], [16, 10]))
