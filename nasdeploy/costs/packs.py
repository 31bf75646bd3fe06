"""Packs: requests and their models in one zip file for a device without nasdeploy, and the answers that come back.

``python3 pack.zip`` runs there (:mod:`nasdeploy.costs.device.pack_runner`) and writes ``latency.json``, which carries
the manifest of its pack, so that it alone says what was measured. Its digest tells a damaged or edited file; it is
no signature: whoever wants to forge one can.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nasdeploy import __version__
from nasdeploy.costs import device
from nasdeploy.costs.device.pack_runner import CODE, MANIFEST, PACK_SCHEMA, digest_of
from nasdeploy.costs.pack_results import check_answered, parse_result
from nasdeploy.costs.sessions import Answers, Request
from nasdeploy.errors import UsageError
from nasdeploy.files import write_whole

__all__ = [
    "MAIN",
    "Pack",
    "PackResult",
    "manifest_bytes",
    "read_answers",
    "read_result",
    "write_pack",
]

MAIN = '''\
"""Measures the models of this pack; needs only numpy and onnxruntime. "--help" tells the options."""

import sys

if sys.version_info < (3, 8):  # said here, in words that every version understands
    sys.stderr.write("error: Python %d.%d; expected 3.8 or newer\\n" % sys.version_info[:2])
    sys.exit(2)

import os

from device.pack_runner import main

sys.exit(main(sys.argv[1:], os.path.dirname(os.path.abspath(__file__))))
'''

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip file can hold


@dataclass(frozen=True, slots=True, kw_only=True)
class PackResult:
    """What came back from a device. manifest: of the pack. seconds: what the measuring took there."""

    path: Path
    manifest: Mapping[str, Any]
    answers: Answers
    seconds: float

    @property
    def purpose(self) -> Mapping[str, Any]:
        """What the pack was written for."""
        purpose: Mapping[str, Any] = self.manifest["purpose"]
        return purpose

    def answers_to(self, requests: Sequence[Request]) -> Answers | None:
        """Return the answers to ``requests``, some of those of the pack in any order; None where it lacks one.

        The same request twice has two answers.
        """
        known: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for request, result in zip(self.manifest["requests"], self.answers.results, strict=True):
            known[digest_of(request)].append(result)
        wanted = [digest_of(request) for request in _packed(requests)[0]]
        if any(count > len(known[key]) for key, count in Counter(wanted).items()):
            return None
        results = {key: iter(rows) for key, rows in known.items()}
        return Answers(
            results=tuple(next(results[key]) for key in wanted),
            machine=self.answers.machine,
            seconds=self.seconds,
        )


class Pack:
    """Requests with the content of their models: the files themselves may go."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.models: dict[str, bytes] = {}

    def add(self, requests: Sequence[Request]) -> None:
        """Take ``requests``, behind those that are there."""
        relative, models = _packed(requests)
        self.requests += relative
        self.models |= models

    def join(self, other: Pack) -> None:
        """Take what ``other`` holds."""
        self.requests += other.requests
        self.models |= other.models

    def write(self, path: Path, *, purpose: Mapping[str, Any]) -> dict[str, Any]:
        """Write the pack to ``path`` and return its manifest; as :func:`write_pack`."""
        return _write(path, self.requests, self.models, purpose=purpose)


def write_pack(path: Path, requests: Sequence[Request], *, purpose: Mapping[str, Any]) -> dict[str, Any]:
    """Write the pack of ``requests`` to ``path`` and return its manifest. The same arguments give the same bytes.

    purpose: plain data, what the reader of the answers needs to know. Raises UsageError where it cannot be written.
    """
    pack = Pack()
    pack.add(requests)
    return pack.write(path, purpose=purpose)


def _write(
    path: Path, requests: Sequence[Request], models: Mapping[str, bytes], *, purpose: Mapping[str, Any]
) -> dict[str, Any]:
    texts = {"__main__.py": MAIN.encode(), **_code()}
    manifest = {
        "schema": PACK_SCHEMA,
        "version": __version__,
        "purpose": dict(purpose),
        "files": {**_hashes(texts), **{name: Path(name).stem for name in sorted(models)}},
        "requests": list(requests),
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:  # stored: random weights hardly get smaller
        for name, content in {
            **texts,
            MANIFEST: manifest_bytes(manifest),
            **dict(sorted(models.items())),
        }.items():
            archive.writestr(_entry(name), content)
    try:
        write_whole(path, stream.getvalue())
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({error.strerror}); expected a file name in a writable folder"
        ) from error
    return manifest


def read_result(path: Path) -> PackResult:
    """Return what a device answered, as far as the file alone can tell whether to believe it.

    The cores that were asked for there are a part of its machine. Raises UsageError for a file that is damaged, was
    changed, comes from other code than this version's, lacks models or requests, or holds numbers that no clock gave.
    """
    result = parse_result(path)
    manifest = result.pack
    if hashlib.sha256(manifest_bytes(manifest)).hexdigest() != result.pack_sha256:
        raise UsageError(
            f"{path}: is of another pack than the one that it holds; expected the file as it was written"
        )
    _check_code(path, manifest)
    check_answered(path, manifest["requests"], result)
    cores = {} if result.cores is None else {"cores": ",".join(map(str, result.cores))}
    return PackResult(
        path=path,
        manifest=manifest,
        answers=Answers(results=tuple(result.results), machine={**result.machine, **cores}),
        seconds=result.seconds,
    )


def read_answers(path: Path, manifest: Mapping[str, Any]) -> Answers:
    """Return the answers in ``path`` to the pack of ``manifest``. Raises UsageError as :func:`read_result`."""
    result = read_result(path)
    if digest_of(dict(result.manifest)) != digest_of(dict(manifest)):
        raise UsageError(f"{path}: is of another pack; expected the answers to this one")
    return result.answers


def _check_code(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise UsageError for times that other code took than this version's: they need not mean the same."""
    there = {name: sha256 for name, sha256 in manifest["files"].items() if name.startswith(f"{CODE}/")}
    if there != _hashes(_code()):
        raise UsageError(
            f"{path}: was measured by the code of another nasdeploy (version {manifest['version']} there, "
            f"{__version__} here); expected the result of a pack of this one: write the pack again and run it"
        )


def _hashes(contents: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _code() -> dict[str, bytes]:
    files = sorted(Path(next(iter(device.__path__))).glob("*.py"))
    return {f"{CODE}/{file.name}": file.read_bytes() for file in files}


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=EPOCH)
    entry.create_system = 3  # Unix, on any system
    entry.external_attr = 0o644 << 16
    return entry


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Return ``pack.json``. The order of its keys is a part of it: models are loaded in that of their request."""
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()


def _packed(requests: Sequence[Request]) -> tuple[list[Request], dict[str, bytes]]:
    """Return ``requests`` with models named after their content, and {name: content} of these."""
    names: dict[str, str] = {}
    models: dict[str, bytes] = {}
    for path in {path for request in requests for path in request["models"].values()}:
        content = Path(path).read_bytes()
        names[path] = f"models/{hashlib.sha256(content).hexdigest()}.onnx"
        models[names[path]] = content
    relative = [
        {**request, "models": {model: names[path] for model, path in request["models"].items()}}
        for request in requests
    ]
    return relative, models
