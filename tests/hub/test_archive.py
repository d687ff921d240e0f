from __future__ import annotations

import hashlib
import io
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from kernelhub.errors import IntegrityError, InvalidMetadata, KernelHubError, StoreError, Violation
from kernelhub.hub import archive
from kernelhub.hub.archive import Limits, pack, pack_tar, read, same_files, unpack

FILES = {"metadata.json": b"{}", "a/b.py": b"x" * 1000, "é" * 60 + "/" + "y" * 90: b"", "z" * 150: b"long"}


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A tar as another tool would make it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as writer:
        for info, data in members:
            writer.addfile(info, io.BytesIO(data))
    return file.getvalue()


def compress(data: bytes) -> bytes:
    return zstandard.compress(data, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder to unpack into; a test ends with nothing beside it."""
    inner = tmp_path / "beside" / "folder"
    inner.mkdir(parents=True)
    return inner


def nothing_beside(folder: Path) -> bool:
    return list(folder.parent.iterdir()) == [folder]


def test_what_is_packed_is_unpacked(folder: Path) -> None:
    unpack(pack(FILES), folder)
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == FILES == read(pack(FILES))


def test_the_same_files_give_the_same_bytes_everywhere() -> None:
    assert pack(FILES) == pack(dict(reversed(FILES.items())))
    # Written down: another Python, system or day must come to the same bytes.
    assert hashlib.sha256(pack_tar(FILES)).hexdigest() == GOLDEN


GOLDEN = "d8b5f25b2518755d223572ef18c4e55415195c0a2514e9be809dffaa6491847d"


def test_another_tool_reads_it() -> None:
    with tarfile.open(fileobj=io.BytesIO(zstandard.ZstdDecompressor().decompress(pack(FILES)))) as reader:
        members = reader.getmembers()
        assert [item.name for item in members] == sorted(FILES)
        assert {(item.mode, item.uid, item.gid, item.mtime, item.uname, item.gname) for item in members} == {
            (0o644, 0, 0, 0, "", "")
        }
        assert {item.name: reader.extractfile(item).read() for item in members} == FILES  # type: ignore[union-attr]


def test_another_tools_archive_is_read() -> None:
    assert read(compress(tar(*(member(name, data) for name, data in FILES.items())))) == FILES


def test_archives_are_compared_by_what_is_in_them() -> None:
    assert same_files(pack(FILES), compress(pack_tar(FILES)))
    assert not same_files(pack(FILES), pack({**FILES, "a/b.py": b"y" * 1000}))


LINKS = {
    "symlink": member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("link", type=tarfile.LNKTYPE, linkname="ok.py"),
    "fifo": member("pipe", type=tarfile.FIFOTYPE),
    "device": member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "folder": member("folder", type=tarfile.DIRTYPE),
    "sparse": member("sparse", type=tarfile.GNUTYPE_SPARSE),
}


@pytest.mark.parametrize("kind", LINKS)
def test_only_regular_files_are_unpacked(kind: str, folder: Path) -> None:
    with pytest.raises(IntegrityError, match="no regular file"):
        unpack(compress(tar(member("ok.py"), LINKS[kind])), folder)
    assert [path.name for path in folder.iterdir()] == ["ok.py"]
    assert nothing_beside(folder)


@pytest.mark.parametrize(
    "path",
    ["../evil", "a/../../evil", "/abs", "..", ".", "a//b", "C:/x", "a\\..\\b", "a\nb", "nul", "dot.", "x" * 1100],
)
def test_a_path_that_leaves_the_folder_is_refused(path: str, folder: Path) -> None:
    with pytest.raises(KernelHubError) as caught:
        unpack(compress(tar(member(path, b"evil"))), folder)
    assert isinstance(caught.value, (InvalidMetadata, IntegrityError))
    assert not list(folder.iterdir())
    assert nothing_beside(folder)
    with pytest.raises(InvalidMetadata):
        pack({path: b""})


def test_a_path_hidden_in_a_pax_header_is_refused_too(folder: Path) -> None:
    info, data = member("innocent", b"evil")
    info.pax_headers = {"path": "../" * 40 + "evil"}
    with pytest.raises(InvalidMetadata, match="not a path inside"):
        unpack(compress(tar((info, data))), folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("headers", [{"size": "5"}, {"linkpath": "/etc"}, {"path": "a", "comment": "b"}])
def test_a_pax_header_may_hold_a_path_alone(headers: dict[str, str]) -> None:
    info, data = member("a", b"1")
    info.pax_headers = headers
    with pytest.raises(IntegrityError, match="more than a path"):
        read(compress(tar((info, data))))


@pytest.mark.parametrize(
    "paths",
    [("a", "a"), ("a.py", "A.py"), ("a/b", "A/b"), ("a/b", "A/c"), ("a", "a/b"), ("a/b", "a"), ("\u00e9", "e\u0301")],
)
def test_two_paths_that_are_one_file_somewhere_are_refused(paths: tuple[str, str]) -> None:
    with pytest.raises(IntegrityError):
        read(compress(tar(*(member(path, path.encode()) for path in paths))))
    if len(set(paths)) == 2:
        with pytest.raises(IntegrityError):
            pack(dict.fromkeys(paths, b""))


@pytest.mark.parametrize("path", ["a.pyc", "__pycache__/a.cpython-311.pyc", "deep/__pycache__/x", "B.PYO"])
def test_bytecode_is_refused(path: str, folder: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        unpack(compress(tar(member(path, b"code"))), folder)
    assert caught.value.violations == (Violation("bytecode", path),)
    assert not list(folder.iterdir())
    with pytest.raises(IntegrityError):
        pack({path: b"code"})


def test_a_truncated_archive_is_refused_wherever_it_ends(folder: Path) -> None:
    data = random.Random(1).randbytes(5000)
    whole, inner = pack({"a": data, "b": data}), pack_tar({"a": data, "b": data})
    # The frame's last 4 bytes are a checksum: without them all the files are still there.
    for end in [*range(0, len(whole) - 4, 331), len(whole) - 5]:
        with pytest.raises(IntegrityError):
            read(whole[:end])
    for end in [*range(0, len(inner), 512), len(inner) - 1]:
        with pytest.raises(IntegrityError):
            read(compress(inner[:end]))


def test_altered_bytes_are_noticed() -> None:
    whole = bytearray(pack({"a": random.Random(1).randbytes(5000)}))
    whole[2500] ^= 1
    with pytest.raises(IntegrityError, match="zstd"):
        read(bytes(whole))


@pytest.mark.parametrize("data", [b"", b"not an archive", b"PK\3\4", compress(b""), compress(b"x" * 512)])
def test_what_is_no_archive_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="not one that kernelhub makes"):
        read(data)


def test_nothing_may_follow() -> None:
    whole, inner = pack(FILES), pack_tar(FILES)
    assert read(compress(inner + bytes(10240))) == FILES
    for more in (inner, b"x" * 512, bytes(512) + b"x"):
        with pytest.raises(IntegrityError):
            read(compress(inner + more))
    for more in (b"x", whole):
        with pytest.raises(IntegrityError):
            read(whole + more)


def zeros(before: bytes, size: int) -> bytes:
    """A frame of `before` and `size` zeros, made without having them in memory."""
    compressor = zstandard.ZstdCompressor(level=3).compressobj()
    parts = [compressor.compress(before)]
    parts += [compressor.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, compressor.flush()])


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_bomb_takes_neither_memory_nor_disk(kind: bytes, folder: Path) -> None:
    size = 1 << 29
    info, _ = member("bomb", type=kind)
    info.size = size
    bomb = zeros(info.tobuf(tarfile.USTAR_FORMAT), size)
    assert len(bomb) < 1 << 20
    limits = Limits(free_bytes=8 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            unpack(bomb, folder, limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    assert sum(path.stat().st_size for path in folder.iterdir()) <= limits.free_bytes + limits.ratio * len(bomb)


def test_padding_may_be_a_bomb_too() -> None:
    with pytest.raises(IntegrityError, match="unpacks to more than"):
        read(zeros(pack_tar({"a": b""}), 1 << 28))


def test_a_frame_that_wants_a_large_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=26, enable_ldm=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = frame.compress(pack_tar({"a": random.Random(2).randbytes(1 << 20)})) + frame.flush()
    with pytest.raises(IntegrityError, match=r"[Mm]emory|window"):
        read(data)


def test_the_number_of_files_is_bounded() -> None:
    files = {f"{number}.py": b"" for number in range(20)}
    assert read(pack(files), Limits(files=20)) == files
    with pytest.raises(IntegrityError, match="more than 19 files"):
        read(pack(files), Limits(files=19))


def test_the_number_of_folders_is_bounded_too() -> None:
    """A path may name 500, and each is a place to remember and to make."""
    deep = {f"{number}/" + "a/" * 8 + "b.py": b"" for number in range(3)}
    assert read(pack(deep), Limits(files=27)) == deep
    with pytest.raises(IntegrityError, match="more than 26 folders"):
        read(pack(deep), Limits(files=26))


def test_a_size_that_lies_is_refused() -> None:
    info, _ = member("a")
    info.size = 1 << 40
    with pytest.raises(IntegrityError, match="truncated"):
        read(compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)))
    info.size = -5
    with pytest.raises(IntegrityError):
        read(compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)))


def test_a_file_that_cannot_be_written_is_the_stores_error(folder: Path) -> None:
    (folder / "a").write_bytes(b"in the way")
    with pytest.raises(StoreError, match="cannot write"):
        unpack(pack({"a/b": b""}), folder)
    with pytest.raises(StoreError, match="cannot write"):
        unpack(pack({"a": b""}), folder)
    assert (folder / "a").read_bytes() == b"in the way"


def test_small_reads_are_enough() -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 7))

    contents = {path: b"".join(data) for path, data in archive.entries(Trickle(pack(FILES)))}
    assert contents == FILES
