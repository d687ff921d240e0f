from __future__ import annotations

import contextlib
import io
import tarfile
import tempfile
from pathlib import Path

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelhub.errors import IntegrityError, InvalidMetadata, KernelHubError
from kernelhub.hub.archive import pack, pack_tar, read, unpack

NAMES = st.text(st.sampled_from("aAbé_-. 1"), min_size=1, max_size=60)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
ANY_PATHS = st.lists(st.sampled_from(["..", ".", "", "a", "A", "b.py", "C:", "x.pyc", "\\", "é"]), max_size=5).map(
    "/".join
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(PATHS, st.binary(max_size=2000), max_size=8))
def test_what_can_be_packed_comes_back_and_nothing_else_is_packed(files: dict[str, bytes]) -> None:
    try:
        packed = pack(files)
    except (IntegrityError, InvalidMetadata):
        return
    assert read(packed) == files
    assert packed == pack(dict(reversed(files.items())))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ANY_PATHS, st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])), max_size=4))
def test_whatever_the_paths_nothing_is_written_outside(members: list[tuple[str, bytes]]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as writer:
        for path, kind in members:
            info = tarfile.TarInfo(path)
            info.type, info.linkname = kind, "../../x"
            writer.addfile(info)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top, "a", "b")
        folder.mkdir(parents=True)
        with contextlib.suppress(KernelHubError):
            unpack(zstandard.compress(file.getvalue()), folder)
        assert [path for path in Path(top).rglob("*") if path.is_symlink()] == []
        assert [
            path for path in Path(top).rglob("*") if folder not in path.parents and path not in (folder, folder.parent)
        ] == []


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_the_bytes_it_is_an_error_of_ours_or_files(data: st.DataObject) -> None:
    inner = bytearray(pack_tar({"a/b.py": b"hello", "c" * 120: b"x" * 600}))
    for _ in range(data.draw(st.integers(1, 4))):
        inner[data.draw(st.integers(0, len(inner) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(IntegrityError, InvalidMetadata):
        read(zstandard.compress(bytes(inner)))
