"""A device behind ssh: against a server of our own where one can be started, and what becomes of its failures."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nasdeploy.costs import ssh
from nasdeploy.costs.device.timing import Plan
from nasdeploy.costs.latency import measure_models, write_reference_model
from nasdeploy.costs.sessions import Request, block_requests
from nasdeploy.costs.ssh import SshDevice
from nasdeploy.errors import ConfigError, NasdeployError, NoisyMeasurementError
from nasdeploy.profiles import Runtime

PLAN = Plan(rounds=2, min_runs=30, min_seconds=0.0, max_seconds=0.5)
SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")

needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="needs an ssh client and server"
)


@pytest.fixture
def requests(tmp_path: Path) -> list[Request]:
    model = tmp_path / "model.onnx"
    write_reference_model(model)
    return block_requests({"model": model}, Runtime(), plan=PLAN, blocks=3, seed=0)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def write_keys(folder: Path) -> None:
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name],
            check=True,
            capture_output=True,
        )


def client_config(folder: Path, port: int) -> Path:
    kind, key, *_ = (folder / "host.pub").read_text().split()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    config = folder / "config"
    config.write_text(
        f"Host board\n HostName 127.0.0.1\n Port {port}\n IdentityFile {folder}/user\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {folder}/known_hosts\n"
    )
    return config


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PidFile {folder}/pid\nPasswordAuthentication no\nUsePAM no\nStrictModes no\n"
    )
    return subprocess.Popen([str(SSHD), "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """An ssh client that reaches a server of this user as "board"."""
    folder = tmp_path_factory.mktemp("sshd")
    write_keys(folder)
    port = free_port()
    command = ("ssh", "-F", str(client_config(folder, port)))
    server = start_server(folder, port)
    try:
        for _ in range(50):
            asked = subprocess.run([*command, "board", "true"], capture_output=True, text=True, check=False)
            if asked.returncode == 0:
                break
            if server.poll() is not None:
                pytest.skip("the ssh server does not start here")
            time.sleep(0.1)
        else:
            pytest.skip(f"the ssh server does not let this user in: {asked.stderr.strip()}")
        yield command
    finally:
        server.terminate()
        server.wait()


@needs_sshd
def test_block_is_measured_over_ssh(
    client: tuple[str, ...], bare_python: Path, requests: list[Request]
) -> None:
    device = SshDevice(host="board", python=str(bare_python), client=client)
    shares: list[float] = []
    answers = device.carry_out(requests, progress=shares.append)
    assert len(answers.results) == 3
    assert all(answer["models"]["model"]["n"] >= 30 for answer in answers.results)
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])
    assert answers.machine == device.carry_out([]).machine
    assert answers.machine["onnx"] is None


@needs_sshd
def test_models_are_measured_over_ssh_as_anywhere(
    client: tuple[str, ...], bare_python: Path, requests: list[Request]
) -> None:
    device = SshDevice(host="board", python=str(bare_python), client=client)
    model = Path(requests[0]["models"]["model"])
    latency = measure_models({"model": model}, Runtime(), min_runs=50, min_seconds=0.0, device=device)[
        "model"
    ]
    assert 0.0 < latency.p50_ms < 100.0
    assert len(latency.blocks) == 5


@needs_sshd
def test_nothing_stays_behind(client: tuple[str, ...], bare_python: Path, tmp_path: Path) -> None:
    python, here = tmp_path / "python", shlex.quote(str(tmp_path))
    python.write_text(
        f'#!/bin/sh\nfolder=$(dirname "$1")\necho "$folder" > {here}/folder\nls "$folder" > {here}/seen\n'
        f'exec {bare_python} "$@"\n'
    )
    python.chmod(0o755)
    SshDevice(host="board", python=str(python), client=client).carry_out([])
    folder = Path((tmp_path / "folder").read_text().strip())
    assert (tmp_path / "seen").read_text() == "pack.zip\n"
    assert folder.is_absolute()
    assert not folder.exists()


@needs_sshd
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"python": "/no/such/python"},
            "board: /no/such/python: cannot be started there .*expected a Python 3.8",
        ),
        ({"python": "no-such-python"}, "board: no-such-python: cannot be started there .*not found"),
        ({"python": "/etc/passwd"}, "board: /etc/passwd: cannot be started there"),
        (
            {"host": "other", "client": ("ssh", "-F", "/dev/null")},
            "other: cannot be reached .*expected a host that",
        ),
    ],
)
def test_device_that_cannot_measure_gets_one_line(
    client: tuple[str, ...], changes: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        SshDevice(**{"host": "board", "client": client, **changes}).carry_out([])  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


@needs_sshd
def test_model_that_is_refused_there_has_its_name_here(
    client: tuple[str, ...], bare_python: Path, tmp_path: Path
) -> None:
    model = tmp_path / "bad.onnx"
    model.write_bytes(b"no model")
    requests = block_requests({"model": model}, Runtime(), plan=PLAN, blocks=1, seed=0)
    with pytest.raises(ConfigError, match=rf"^board: {model}: onnxruntime cannot load it"):
        SshDevice(host="board", python=str(bare_python), client=client).carry_out(requests)


def fake_client(folder: Path, script: str) -> tuple[str, ...]:
    """Return an ssh client that only does what ``script`` says."""
    path = folder / "fake-ssh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return (str(path),)


@pytest.mark.parametrize(
    ("script", "error", "expected"),
    [
        ("echo 'Connection refused' >&2; exit 255", ConfigError, "cannot be reached .Connection refused."),
        ("echo 'error: no onnxruntime' >&2; exit 2", ConfigError, "^board: no onnxruntime$"),
        ("echo 'error: not within 60 s' >&2; exit 5", NoisyMeasurementError, "^board: not within 60 s$"),
        ("echo 'error: it died' >&2; exit 1", NasdeployError, "ended with code 1 .it died."),
        ("kill -9 $$", NasdeployError, "ended with code -9"),
        ("echo 'disk full' >&2; exit 91", ConfigError, "its temporary folder cannot be written .disk full."),
        ("exit 0", NasdeployError, "cannot be read"),
    ],
)
def test_what_ends_the_client_becomes_one_line(
    tmp_path: Path, script: str, error: type[NasdeployError], expected: str
) -> None:
    with pytest.raises(error, match=expected) as caught:
        SshDevice(host="board", client=fake_client(tmp_path, script)).carry_out([])
    assert len(str(caught.value).splitlines()) == 1


def test_refused_answer_names_no_file_that_is_gone(tmp_path: Path) -> None:
    client = fake_client(tmp_path, f"cat > /dev/null; printf '\\n%s\\n{{}}' '{ssh.MARK}'")
    with pytest.raises(NasdeployError) as caught:
        SshDevice(host="board", client=client).carry_out([])
    assert str(caught.value) == (
        "board: its answer: schema None; expected 'nasdeploy/pack-result/1', a file that a pack wrote; the same "
        "command measures again"
    )
    assert caught.value.exit_code == 1


def test_missing_client_gets_one_line() -> None:
    with pytest.raises(ConfigError, match="no-ssh-here: not found; expected an ssh client"):
        SshDevice(host="board", client=("no-ssh-here",)).carry_out([])


def test_silent_device_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "START_SECONDS", -ssh.CONNECT_SECONDS)
    started = time.monotonic()
    with pytest.raises(NoisyMeasurementError, match="board: nothing was heard of it for"):
        SshDevice(host="board", client=fake_client(tmp_path, "exec sleep 60")).carry_out([])
    assert time.monotonic() - started < 30.0


def local_shell(folder: Path) -> tuple[str, ...]:
    """Return a client that runs the command in a shell here, in an own home folder, as the server would."""
    return fake_client(
        folder, f'for command; do :; done\ncd {shlex.quote(str(folder))} && exec sh -c "echo noise; $command"'
    )


def test_command_survives_the_shell_there(bare_python: Path, tmp_path: Path, requests: list[Request]) -> None:
    """The path of the Python holds what a shell would take apart, and start-up files print to stdout."""
    odd = tmp_path / "it's a $(touch hit) folder"
    odd.mkdir()
    wrapper = odd / "run"
    wrapper.write_text(f'#!/bin/sh\nexec {bare_python} "$@"\n')
    wrapper.chmod(0o755)
    device = SshDevice(host="board", python=f"~/{odd.name}/run", client=local_shell(tmp_path))
    assert len(device.carry_out(requests[:1]).results) == 1
    assert not (tmp_path / "hit").exists()


def test_host_is_never_an_option(tmp_path: Path) -> None:
    client = fake_client(
        tmp_path, f'printf "%s\\n" "$@" > {shlex.quote(os.fspath(tmp_path))}/arguments; exit 255'
    )
    with pytest.raises(ConfigError):
        SshDevice(host="-oProxyCommand=x", client=client).carry_out([])
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[arguments.index("-oProxyCommand=x") - 1] == "--"
