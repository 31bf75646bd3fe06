"""A device that is reached over ssh: it measures a pack, in one connection, and keeps nothing.

The pack goes in by stdin, progress comes back by stderr and the result by stdout. What names the host and how it is
reached (port, key, jump host) is the business of the user's own ssh client and its configuration; no password is
ever asked for.
"""

from __future__ import annotations

import queue
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nasdeploy.costs.device.pack_runner import NOISY, REFUSED
from nasdeploy.costs.device.runner import deadline_seconds
from nasdeploy.costs.packs import read_answers, write_pack
from nasdeploy.costs.sessions import Answers, Progress, Request
from nasdeploy.errors import ConfigError, NasdeployError, NoisyMeasurementError, UsageError

__all__ = ["SshDevice"]

CONNECT_SECONDS = 15
START_SECONDS = 180.0
SLOWEST_BYTES_PER_SECOND = 50e3
MARGIN_SECONDS = 60.0

OPTIONS = (
    "-T",
    *("-o", "BatchMode=yes"),
    *("-o", f"ConnectTimeout={CONNECT_SECONDS}"),
    *("-o", "ServerAliveInterval=15"),
    *("-o", "ServerAliveCountMax=8"),
    *("-o", "ControlMaster=no"),  # one that stays behind would keep stderr open
)

MARK = "nasdeploy: result"
UNWRITABLE, NO_RESULT = 91, 92

# Start-up files of the shell there may print, so a mark stands before the result. Whatever happens, the folder goes.
SCRIPT = f"""
folder=$(mktemp -d) || exit {UNWRITABLE}
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
cat > "$folder/pack.zip" || exit {UNWRITABLE}
"$0" "$folder/pack.zip" --output "$folder/latency.json" >&2 || exit $?
printf '\\n%s\\n' '{MARK}'
cat "$folder/latency.json" || exit {NO_RESULT}
"""

SSH_FAILED, NOT_EXECUTABLE, NOT_FOUND = 255, 126, 127

_PROGRESS = re.compile(r"\[(\d+)/(\d+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SshDevice:
    """A device behind ssh. host: what ssh connects to. python: the command there. client: the ssh client."""

    host: str
    python: str = "python3"
    client: tuple[str, ...] = ("ssh",)

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.host

    def carry_out(self, requests: Sequence[Request], *, progress: Progress | None = None) -> Answers:
        """Measure there, one request after the other.

        Raises ConfigError for a device that cannot be reached, lacks Python or a package, or refuses a model,
        NoisyMeasurementError when a process there does not end in time, NasdeployError when one dies or its answer
        cannot be believed.
        """
        if shutil.which(self.client[0]) is None:
            raise ConfigError(f"{self.client[0]}: not found; expected an ssh client to reach {self.host}")
        with tempfile.TemporaryDirectory(prefix="nasdeploy-") as folder:
            pack, result = Path(folder, "pack.zip"), Path(folder, "latency.json")
            manifest = write_pack(pack, requests, purpose={"kind": "ssh"})
            with pack.open("rb") as source, Path(folder, "output").open("w+b") as output:
                code, told = self._run(source, output, requests, progress, size=pack.stat().st_size)
                if code != 0:
                    raise self._error(code, told, _original_names(requests, manifest["requests"]))
                result.write_bytes(_after_mark(output))
            try:
                return read_answers(result, manifest)
            except UsageError as error:
                why = str(error).replace(str(result), "its answer")  # that file is gone in a moment
                raise NasdeployError(f"{self.host}: {why}; the same command measures again") from error

    def _run(
        self,
        source: IO[bytes],
        output: IO[bytes],
        requests: Sequence[Request],
        progress: Progress | None,
        *,
        size: int,
    ) -> tuple[int, list[str]]:
        """Return the exit code of the client and what it said on stderr, told of on the way."""
        lines: list[str] = []
        limits = [deadline_seconds(request) + MARGIN_SECONDS for request in requests]
        limit = CONNECT_SECONDS + START_SECONDS + size / SLOWEST_BYTES_PER_SECOND + sum(limits[:1])
        with _Client(self._command(), source, output) as client:
            try:
                while (line := client.next_line(limit)) is not None:
                    lines.append(line)
                    if match := _PROGRESS.match(line):
                        done = int(match[1])
                        limit = max(limits[done : done + 1], default=MARGIN_SECONDS)
                        if progress:
                            progress(done / int(match[2]))
                return client.process.wait(timeout=limit), lines
            except (queue.Empty, subprocess.TimeoutExpired) as error:
                raise NoisyMeasurementError(
                    f"{self.host}: nothing was heard of it for {limit:.0f} s; expected a device that is less busy"
                ) from error

    def _command(self) -> list[str]:
        """Return the local command; the only text that a shell there sees is quoted as a whole."""
        # Commands start in the home folder; a quoted "~" would not be expanded.
        python = f"./{self.python[2:]}" if self.python.startswith("~/") else self.python
        script = " ".join(map(shlex.quote, ("sh", "-c", SCRIPT, python)))
        return [*self.client, *OPTIONS, "--", self.host, script]

    def _error(self, code: int, lines: Sequence[str], names: dict[str, str]) -> NasdeployError:
        told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        last = (told or [line for line in lines if line.strip()] or [f"it ended with code {code}"])[
            -1
        ].strip()
        for name, original in names.items():
            last = last.replace(name, original)
        if told and code == NOISY:
            return NoisyMeasurementError(f"{self.host}: {last}")
        if told and code == REFUSED:
            return ConfigError(f"{self.host}: {last}")
        if code == SSH_FAILED:
            return ConfigError(
                f"{self.host}: cannot be reached ({last}); expected a host that `ssh {self.host} true` reaches "
                "without a password"
            )
        if code in (NOT_FOUND, NOT_EXECUTABLE):
            return ConfigError(
                f"{self.host}: {self.python}: cannot be started there ({last}); expected a Python 3.8 or newer as "
                "device.python"
            )
        if code == UNWRITABLE:
            return ConfigError(
                f"{self.host}: its temporary folder cannot be written ({last}); expected room there"
            )
        return NasdeployError(f"{self.host}: measuring ended with code {code} ({last})")


class _Client:
    """The ssh client as a process that ends with this context."""

    def __init__(self, command: Sequence[str], source: IO[bytes], output: IO[bytes]) -> None:
        self.process = subprocess.Popen(command, stdin=source, stdout=output, stderr=subprocess.PIPE)
        self._waiting = queue.SimpleQueue[str | None]()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def next_line(self, timeout_s: float) -> str | None:
        """Return the next line of stderr, None behind the last one. Raises queue.Empty after a long silence."""
        return self._waiting.get(timeout=timeout_s)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self._waiting.put(line.decode(errors="replace").rstrip())
        self._waiting.put(None)


def _after_mark(output: IO[bytes]) -> bytes:
    output.seek(0)
    return output.read().rpartition(f"\n{MARK}\n".encode())[2]


def _original_names(requests: Sequence[Request], packed: Sequence[Request]) -> dict[str, str]:
    """Return {name in the pack: path here}."""
    return {
        there["models"][model]: path
        for here, there in zip(requests, packed, strict=True)
        for model, path in here["models"].items()
    }
