"""A variant's files as one archive: a tar in a zstd frame. Packed to the same bytes everywhere, unpacked with distrust.

Fixed in the tar: regular files only, sorted by path, owner and group 0 without names, mode 0644, time 0; ustar headers,
with a pax header before them only where a path needs one (longer than 100 bytes or not ASCII). So the tar's bytes
depend on paths and contents alone. The zstd frame has level 12, one thread, a checksum and the content size; another
release of libzstd may compress the same tar to other bytes, so `same_files` compares two archives by what is in them.

`unpack` reads with bounded memory, whatever the archive says of itself: it takes the headers apart one by one, since
the standard library's reader keeps a whole pax header in memory, and 8 GiB of zeros fit in one of 1 MiB.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

from kernelhub.core.paths import Tree, clashing, is_bytecode, safe_path
from kernelhub.errors import IntegrityError, Violation
from kernelhub.hub.disk import writing

LEVEL = 12

# libzstd allocates a frame's window before it decodes a byte. Level 12 makes windows of 4 MiB; level 19, which another
# tool may use, 8 MiB.
_MAX_WINDOW = 16 * 1024 * 1024

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1024 * 1024
_MAX_PAX_HEADER = 16 * 1024  # a path has at most 1024 characters


@dataclass(frozen=True)
class Limits:
    """How much an archive may unpack to.

    `files` and `bytes` are bounds on all of it. `ratio` bounds the bytes by those that were read of the archive, over
    an allowance of `free_bytes`: code and shared objects compress 2 to 10 times, a bomb thousands.
    """

    files: int = 50_000
    bytes: int = 16 * 1024**3
    ratio: int = 200
    free_bytes: int = 64 * 1024**2


def pack(files: Mapping[str, bytes]) -> bytes:
    """The archive of files, by their paths relative to the variant's folder (`/` on every system).

    Raises `InvalidMetadata` for a path that could not be unpacked everywhere, `IntegrityError` for bytecode.
    """
    import zstandard  # here: it is needed only when something is published or fetched

    compressor = zstandard.ZstdCompressor(level=LEVEL, threads=0, write_checksum=True, write_content_size=True)
    return compressor.compress(pack_tar(files))


def check_paths(paths: Iterable[str]) -> None:
    """Raise what `pack` raises for files of these paths."""
    seen = _Seen()
    for path in paths:
        seen.add(path)


def pack_tar(files: Mapping[str, bytes]) -> bytes:
    """The tar inside the archive: its bytes depend on paths and contents alone."""
    check_paths(files)
    parts = []
    for path, data in sorted(files.items()):
        info = tarfile.TarInfo(path)
        info.size, info.mode = len(data), 0o644
        parts += [info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"), data, b"\0" * (-len(data) % _BLOCK)]
    return b"".join([*parts, b"\0" * (2 * _BLOCK)])


def unpack(archive: bytes | BinaryIO, folder: Path, limits: Limits | None = None) -> None:
    """Write the archive's files into the existing, empty `folder`, and nothing outside it.

    Memory stays below about 24 MiB whatever the archive holds. Raises `IntegrityError` or `InvalidMetadata` for an
    archive that is not what `pack` makes (a link, a device, a path that leaves the folder, a path twice, bytecode, more
    than `limits`, a truncated stream), `StoreError` where a file cannot be written. The folder then has part of the
    files: the caller throws it away.
    """
    for path, contents in entries(archive, limits):
        _write(folder, path, contents)


def read(archive: bytes | BinaryIO, limits: Limits | None = None) -> dict[str, bytes]:
    """The archive's files in memory, by path; raises as `unpack` does."""
    return {path: b"".join(contents) for path, contents in entries(archive, limits)}


def same_files(one: bytes, other: bytes) -> bool:
    """Whether two archives hold the same files, however they are compressed."""
    return one == other or read(one) == read(other)


def entries(archive: bytes | BinaryIO, limits: Limits | None = None) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Each file's path and its contents in pieces, which must be used up before the next file; raises as `unpack`."""
    stream = _Stream(BytesIO(archive) if isinstance(archive, bytes) else archive, limits or Limits())
    seen = _Seen(stream.limits.files)
    path: str | None = None
    while True:
        block = stream.exactly(_BLOCK)
        if not block.strip(b"\0"):
            break
        header = _header(block)
        if header.type == tarfile.XHDTYPE and path is None:
            path = _pax_path(stream.exactly(_padded(header, _MAX_PAX_HEADER))[: header.size])
            continue
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise _bad(f"{header.name!r} is no regular file (tar type {header.type!r})")
        name = header.name if path is None else path
        seen.add(name)
        yield name, stream.pieces(header.size)
        path = None
    if path is not None or stream.exactly(_BLOCK).strip(b"\0"):
        raise _bad("it does not end as a tar does")
    stream.finish()


def _bad(problem: str) -> IntegrityError:
    return IntegrityError(
        f"the archive is not one that kernelhub makes: {problem}",
        hint="It is damaged, or something else: get it again, or ask who made it.",
    )


@dataclass
class _Seen:
    """The paths of an archive so far."""

    limit: int = Limits.files
    tree: Tree = field(default_factory=Tree)

    def add(self, path: str) -> None:
        safe_path(path)
        if is_bytecode(path):
            raise IntegrityError("the archive holds bytecode, which is never run", [Violation("bytecode", path)])
        if self.tree.files >= self.limit:
            raise _bad(f"it has more than {self.limit:,} files")
        if (there := self.tree.clash(path)) is not None:
            raise _bad(clashing(path, there))
        if self.tree.folders > self.limit:
            raise _bad(f"it has more than {self.limit:,} folders")


class _Stream:
    """The tar's bytes, read forward only and counted."""

    def __init__(self, source: BinaryIO, limits: Limits) -> None:
        import zstandard

        self.limits = limits
        self._error: type[Exception] = zstandard.ZstdError
        self._source = _Counted(source)
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        self._reader = decompressor.stream_reader(
            cast("BinaryIO", self._source), read_size=64 * 1024, read_across_frames=True, closefd=False
        )
        self._count = 0

    def _some(self, size: int) -> bytes:
        try:
            data: bytes = self._reader.read(size)
        except self._error as error:
            raise _bad(f"zstd: {error}") from error
        self._count += len(data)
        limits = self.limits
        allowed = min(limits.bytes, limits.free_bytes + limits.ratio * self._source.count)
        if self._count > allowed:
            raise _bad(f"it unpacks to more than {allowed:,} bytes from {self._source.count:,}")
        return data

    def exactly(self, size: int) -> bytes:
        """The next `size` bytes, a small number."""
        data = b""
        while len(data) < size:
            more = self._some(size - len(data))
            if not more:
                raise _bad("it is truncated")
            data += more
        return data

    def pieces(self, size: int) -> Iterator[bytes]:
        """A file's contents; the padding after them is read too."""
        left = size
        while left:
            data = self._some(min(left, _CHUNK))
            if not data:
                raise _bad("it is truncated")
            left -= len(data)
            yield data
        if self.exactly(-size % _BLOCK).strip(b"\0"):
            raise _bad("its padding is not empty")

    def finish(self) -> None:
        """Only padding may follow."""
        while data := self._some(_CHUNK):
            if data.strip(b"\0"):
                raise _bad("something follows its last file")


class _Counted:
    """A file being read, and how much of it was."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self.count = 0

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self.count += len(data)
        return data


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise _bad(f"a tar header is malformed: {error}") from error
    if header.size < 0:
        raise _bad(f"{header.name!r} has a negative size")
    return header


def _padded(header: tarfile.TarInfo, limit: int) -> int:
    if header.size > limit:
        raise _bad(f"a pax header has {header.size:,} bytes; the most is {limit:,}")
    return header.size + (-header.size % _BLOCK)


def _pax_path(data: bytes) -> str:
    """The path in a pax header, whose records are `<length> <key>=<value>\\n`; another key is an error."""
    length, space, _ = data.partition(b" ")
    prefix = len(length) + len(space)
    whole = length.isdigit() and len(length) <= 5 and int(length) == len(data) and data.endswith(b"\n")
    if not whole or data[prefix : prefix + 5] != b"path=":
        raise _bad(f"a pax header holds more than a path: {data[:80]!r}")
    try:
        return data[prefix + 5 : -1].decode()
    except UnicodeDecodeError as error:
        raise _bad(f"a path is not UTF-8: {error}") from error


def _write(folder: Path, path: str, contents: Iterator[bytes]) -> None:
    target = folder.joinpath(*path.split("/"))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            for data in contents:
                file.write(data)
