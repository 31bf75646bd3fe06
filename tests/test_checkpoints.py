"""States in one file, the signals that ask for one, and loops that continue from it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nasdeploy import interruption
from nasdeploy.checkpoints import load_checkpoint, load_optimizer, save_checkpoint
from nasdeploy.errors import RunFolderError
from nasdeploy.interruption import stopping_between_steps
from nasdeploy.pipeline import resuming
from nasdeploy.pipeline.resuming import Checkpoint, carry_out

SCHEMA = "test/1"


@pytest.fixture(autouse=True)
def heeded_interrupts() -> Iterator[None]:
    """A shell starts what it puts into the background with SIGINT ignored, and that is respected."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_state_comes_back_bit_by_bit(tmp_path: Path) -> None:
    state = {
        "numbers": [0.1, 1e-300, -0.0, 2**127, None, True, "text"],
        "nested": {"tensors": [torch.arange(6).reshape(2, 3), torch.tensor(0.1)], "empty": {}},
        "rng": np.random.default_rng(5).bit_generator.state,
        "strided": torch.arange(6.0).reshape(2, 3).T,
        "bytes": torch.get_rng_state(),
    }
    save_checkpoint(tmp_path / "state", state, schema=SCHEMA)
    found = load_checkpoint(tmp_path / "state", schema=SCHEMA)
    assert found["numbers"] == state["numbers"]
    assert str(found["numbers"][2]) == "-0.0"
    assert found["rng"] == state["rng"]
    assert found["nested"]["empty"] == {}
    pairs = [
        (found["nested"]["tensors"][0], torch.arange(6).reshape(2, 3)),
        (found["nested"]["tensors"][1], torch.tensor(0.1)),
        (found["strided"], torch.arange(6.0).reshape(2, 3).T),
        (found["bytes"], state["bytes"]),
    ]
    assert all(torch.equal(left, right) and left.dtype == right.dtype for left, right in pairs)


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    whole = torch.arange(4.0)
    save_checkpoint(tmp_path / "state", {"whole": whole, "part": whole[1:], "again": whole}, schema=SCHEMA)
    found = load_checkpoint(tmp_path / "state", schema=SCHEMA)
    assert torch.equal(found["part"], whole[1:])
    assert torch.equal(found["again"], whole)


@pytest.mark.parametrize("damage", ["cut", "text", "schema", "missing"])
def test_a_damaged_state_is_named_on_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, {"a": torch.zeros(100)}, schema="other/1" if damage == "schema" else SCHEMA)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "text":
        path.write_text("nothing")
    elif damage == "missing":
        path.unlink()
    with pytest.raises(RunFolderError) as refused:
        load_checkpoint(path, schema=SCHEMA)
    assert str(path) in str(refused.value)
    assert "delete it and build again" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_buffers_take_the_memory_format_of_their_parameters(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        return network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        network(torch.ones(1, 4, 5, 5)).square().sum().backward()
        optimizer.step()

    first, optimizer = make()
    step(first, optimizer)
    save_checkpoint(tmp_path / "state", {"w": first.state_dict(), "o": optimizer.state_dict()}, schema=SCHEMA)
    state = load_checkpoint(tmp_path / "state", schema=SCHEMA)
    second, other = make()
    second.load_state_dict(state["w"])
    load_optimizer(other, state["o"])
    for parameter, values in other.state.items():
        assert values["momentum_buffer"].stride() == parameter.stride()
    step(first, optimizer)
    step(second, other)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_step(number: int) -> None:
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with stopping_between_steps() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_second_signal_does_not_wait() -> None:
    with stopping_between_steps():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_step_that_takes_too_long_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "GRACE_SECONDS", 0.05)
    with stopping_between_steps():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(20)


def test_a_signal_that_python_does_not_handle_stays_as_it_is() -> None:
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping_between_steps() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_other_threads_are_left_alone() -> None:
    found: list[bool] = []

    def work() -> None:
        with stopping_between_steps() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


class Counting:
    """A loop whose state is the list of its steps."""

    def __init__(self, num_steps: int, on_step: Callable[[int], None] = lambda step: None) -> None:
        self.num_steps, self.num_done = num_steps, 0
        self.steps: list[int] = []
        self._on_step = on_step

    def step(self) -> int:
        self._on_step(self.num_done)
        self.steps.append(self.num_done)
        self.num_done += 1
        return self.num_done

    def state_dict(self) -> dict[str, Any]:
        return {"num_done": self.num_done, "steps": list(self.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_done, self.steps = state["num_done"], state["steps"]


def checkpoint(folder: Path, owner: str = "me") -> Checkpoint:
    return Checkpoint(folder / "state", schema=SCHEMA, owner=owner)


def stop_at(step: int, wanted: int) -> None:
    if step == wanted:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_loop_that_is_interrupted_continues_behind_its_last_step(tmp_path: Path) -> None:
    first, saved = Counting(10, lambda step: stop_at(step, 3)), []
    with pytest.raises(KeyboardInterrupt):
        carry_out(
            first,
            checkpoint(tmp_path),
            after_step=lambda step: None,
            before_save=lambda: saved.append(first.num_done),
        )
    assert (first.steps, saved) == ([0, 1, 2, 3], [4])
    second, seen = Counting(10), list[int]()
    seconds = carry_out(second, checkpoint(tmp_path), after_step=seen.append)
    assert seen == [5, 6, 7, 8, 9, 10]
    assert second.steps == list(range(10))
    assert seconds > 0.0


def test_the_state_of_another_owner_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        carry_out(
            Counting(10, lambda step: stop_at(step, 3)), checkpoint(tmp_path), after_step=lambda step: None
        )
    other = Counting(10)
    carry_out(other, checkpoint(tmp_path, owner="you"), after_step=lambda step: None)
    assert len(other.steps) == 10


def test_a_state_is_stored_when_it_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(resuming, "MAX_SAVING_SHARE", 1e9)
    loop, known = Counting(5), checkpoint(tmp_path)
    found: list[int] = []

    def after_step(step: int) -> None:
        stored = known.load()
        found.append(0 if stored is None else stored["loop"]["num_done"])

    carry_out(loop, known, after_step=after_step)
    assert found == [0, 1, 2, 3, 4]
    known.discard()
    assert known.load() is None
