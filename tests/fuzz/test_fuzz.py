"""Every parser of bytes from elsewhere, for some seconds; `make fuzz` takes its time. And bombs: small input, much memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import targets
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS, Target

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=6)


def edited(seed: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """The bytes with some replaced, some left out, some put in."""
    data = bytearray(seed)
    for where, cut, new in changes:
        place = int(where * len(data))
        data[place : place + cut] = new
    return bytes(data)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container of a JSON value with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_bytes_are_read_or_refused(name: str, data: st.DataObject) -> None:
    target = TARGETS[name]
    target.run(edited(data.draw(st.sampled_from(target.seeds)), data.draw(edits)))


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.text])
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_other_values_are_read_or_refused(name: str, data: st.DataObject) -> None:
    """Well-formed JSON with something else in one place: what a change of bytes seldom makes."""
    seeds = [seed for seed in TARGETS[name].seeds if seed[:1] in b"[{"]
    value = json.loads(data.draw(st.sampled_from(seeds)))
    container, key = data.draw(st.sampled_from(list(places(value))))
    container[key] = data.draw(values)
    TARGETS[name].run(json.dumps(value).encode())


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused(name: str, data: bytes) -> None:
    TARGETS[name].run(data)


# Bombs: at most 64 MiB of memory for 1 MiB of input

MIB = 1024**2
BOMBS: dict[str, Callable[[], bytes]] = {
    "brackets": lambda: b"[" * MIB,
    "braces": lambda: b'{"":' * (MIB // 4),
    "empty lists": lambda: b"[" + b"[]," * (MIB // 3) + b"[]]",
    "small objects": lambda: b"[" + b'{"":0},' * (MIB // 7) + b"{}]",
    "keys": lambda: b"{" + b",".join(b'"%x":0' % number for number in range(MIB // 9)) + b"}",
    "one text": lambda: b'"' + b"\\u1234" * (MIB // 6) + b'"',
    "zeros, packed": lambda: zstandard.compress(bytes(256 * MIB), 1),
    "zeros, as a tar of one file": lambda: zstandard.compress(_tar_of_zeros(256 * MIB), 1),
    "noise": lambda: random.Random(1).randbytes(MIB),
}


def _tar_of_zeros(size: int) -> bytes:
    import tarfile

    info = tarfile.TarInfo("zeros")
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(size)


def _peaks(target: Target, bombs: dict[str, bytes], out: Any) -> None:
    """How much more memory this process had while it read each, in a process of its own."""
    for name, data in bombs.items():
        for embedded in (data, b'{"branches": ' + data + b', "manifest": ' + data[:1] + b"}"):
            Path("/proc/self/clear_refs").write_text("5")
            before = _memory("VmRSS")
            target.run(embedded)
            out.send((name, _memory("VmHWM") - before))
    out.send(("", 0))


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    return {name: make() for name, make in BOMBS.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells how much memory was used")
@pytest.mark.parametrize("name", ["metadata", "manifest", "archive", "tree", "hub"])
def test_a_small_input_takes_little_memory(bombs: dict[str, bytes], name: str) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let a process forget its peak")
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=_peaks, args=(TARGETS[name], bombs, send), daemon=True)
    process.start()
    send.close()
    taken: dict[str, int] = {}
    while "" not in taken:
        assert receive.poll(60), f"it hangs, after {list(taken)}"
        bomb, size = receive.recv()
        taken[bomb] = max(taken.get(bomb, 0), size)
    process.join(10)
    assert {bomb: f"{size / MIB:.0f} MiB" for bomb, size in taken.items() if size > 64 * MIB} == {}


@pytest.mark.parametrize("name", ["metadata", "manifest", "archive", "tree", "lock", "revocations", "config", "report"])
def test_what_is_changed_was_right(name: str) -> None:
    """Seeds that no parser reads would not lead far."""
    from kernelhub.config import document
    from kernelhub.layers.report_values import KernelReport

    read: dict[str, Callable[[bytes], Any]] = {
        "metadata": targets.Metadata.parse,
        "manifest": targets.ManifestDocument.parse,
        "archive": targets.read,
        "tree": lambda data: targets._plan(targets._source(data)._tree("/tree"), "build/torch-cpu/"),
        "lock": targets.LockFile.parse,
        "revocations": lambda data: targets.RevocationsDocument.parse(data, targets.KEY),
        "config": lambda data: document.from_json(json.loads(data), document.Grants()),
        "report": lambda data: KernelReport.from_dict(json.loads(data)),
    }
    assert read[name](TARGETS[name].seeds[0])
