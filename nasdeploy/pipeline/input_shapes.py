"""What the inputs of a model are fed with: the sizes that its file leaves open, from the batch size and --shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nasdeploy.errors import ConfigError
from nasdeploy.exporters.structure import TensorInfo

Shape = tuple[int, ...]
Size = int | str | None

EXAMPLE_SIDE, EXAMPLE_LENGTH = 224, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The batch size and who asked for it, such as "--batch-size"; "": nobody, it may give way to the file's."""

    size: int
    asked_by: str = ""


def resolve_shapes(
    inputs: Sequence[TensorInfo], *, path: Path, batch: Batch, given: Mapping[str, Sequence[int]]
) -> dict[str, Shape]:
    """Return {input: shape} with every size known.

    given: shapes that the user stated, of inputs of this or of another model. The first dimension is the batch where
    the file leaves it open. Dimensions of one name have one size, also in different inputs. Raises ConfigError for a
    shape that the file excludes and for what stays open, with what would work.
    """
    sizes: dict[str, int] = {}
    for value in inputs:
        if value.name in given:
            _check_given(value, given[value.name], path)
            for size, wanted in zip(_dimensions(value), given[value.name], strict=False):
                _bind(sizes, size, wanted, value=value, path=path)
    for value in inputs:
        if value.name not in given and value.shape:
            first = _dimensions(value)[0]
            if isinstance(first, str):
                sizes.setdefault(first, batch.size)
    shapes = {value.name: _shape(value, given, sizes, batch, path) for value in inputs}
    _check_batch(inputs, shapes, given, batch, path)
    return shapes


def _dimensions(value: TensorInfo) -> tuple[Size, ...]:
    """Return the sizes of ``value``. Some exporters write an open one as 0, as -1, or by the name "?"."""
    return tuple(
        None if size == "?" or (isinstance(size, int) and size <= 0) else size for size in value.shape
    )


def _check_given(value: TensorInfo, given: Sequence[int], path: Path) -> None:
    dimensions = _dimensions(value)
    fits = len(dimensions) == len(given) and all(
        not isinstance(size, int) or size == wanted for size, wanted in zip(dimensions, given, strict=True)
    )
    # No dimensions at all: a scalar, or a file that does not say how many there are.
    if dimensions and not fits:
        raise ConfigError(
            f"--shape {value.name}={show_shape(given)}: the input of {path} is {show_shape(dimensions)}; "
            "expected a shape that fits it"
        )


def _bind(sizes: dict[str, int], name: Size, size: int, *, value: TensorInfo, path: Path) -> None:
    if isinstance(name, str) and sizes.setdefault(name, size) != size:
        raise ConfigError(
            f"--shape {value.name}: makes the dimension '{name}' of {path} both {sizes[name]} and {size}; "
            "expected one size"
        )


def _shape(
    value: TensorInfo, given: Mapping[str, Sequence[int]], sizes: Mapping[str, int], batch: Batch, path: Path
) -> Shape:
    if value.name in given:
        return tuple(given[value.name])
    dimensions = _dimensions(value)
    known = [sizes.get(size, size) if isinstance(size, str) else size for size in dimensions]
    if known and known[0] is None:
        known[0] = batch.size
    if not all(isinstance(size, int) for size in known):
        example = show_shape(tuple(_examples(known)))
        raise ConfigError(
            f"{path}: its input '{value.name}' is {show_shape(known)}; expected the sizes that it leaves open, "
            f"such as --shape {value.name}={example}"
        )
    return tuple(size for size in known if isinstance(size, int))


def _examples(sizes: Sequence[Size]) -> Iterator[int]:
    for size in sizes:
        yield size if isinstance(size, int) else EXAMPLE_SIDE if len(sizes) == 4 else EXAMPLE_LENGTH


def _check_batch(
    inputs: Sequence[TensorInfo],
    shapes: Mapping[str, Shape],
    given: Mapping[str, Sequence[int]],
    batch: Batch,
    path: Path,
) -> None:
    """Raise ConfigError where a batch size was asked for that the file does not take."""
    if not batch.asked_by or not inputs or inputs[0].name in given or len(inputs[0].shape) < 2:
        return
    found = shapes[inputs[0].name][0]
    if found != batch.size:
        raise ConfigError(
            f"{path}: its input '{inputs[0].name}' is {show_shape(inputs[0].shape)}, a fixed batch of {found}; "
            f"expected {batch.size}, as {batch.asked_by} says"
        )


def show_shape(sizes: Sequence[Size]) -> str:
    """Return a shape as people write it, such as "1x3x?x?"; a size that nobody knows is "?" or its name."""
    return "x".join("?" if size is None else str(size) for size in sizes)
