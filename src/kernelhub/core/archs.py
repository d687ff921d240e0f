"""Device architectures: does a build cover this device?

>>> covers(("8.0", "9.0+PTX"), "12.0"), covers(("8.0", "9.0a"), "10.0"), covers(("8.0",), "8.6")
(True, False, True)
"""

from __future__ import annotations

import re

from kernelhub.errors import InvalidMetadata

_CUDA = re.compile(r"([1-9][0-9]?)\.([0-9])([af])?(\+PTX)?", re.ASCII)


def is_cuda_arch(text: str) -> bool:
    """Whether it is written as a CUDA architecture: `9.0`, `9.0a`, `10.0f` or `10.0+PTX`."""
    return _CUDA.fullmatch(text) is not None


def covers(archs: tuple[str, ...], device: str) -> bool:
    """Whether a build for `archs` runs on a device of architecture `device` (`"9.0"`, or AMD's `"gfx942"`).

    CUDA: binary code for `8.0` runs on 8.x with x not smaller; `9.0a` runs on 9.0 alone; `10.0f` on 10.x with x not
    smaller; `9.0+PTX` on everything from 9.0 on (it is compiled when loaded). Other names must be equal. A build that
    names no architectures covers all. Raises `InvalidMetadata` for an unknown CUDA architecture, wherever it stands.
    """
    answers = [_covers(arch, device) for arch in archs]
    return not answers or any(answers)


def _covers(arch: str, device: str) -> bool:
    have = _CUDA.fullmatch(device)
    if not have:
        return arch.partition(":")[0] == device.partition(":")[0]
    built = _CUDA.fullmatch(arch)
    if not built:
        raise InvalidMetadata(f"metadata.json: backend: archs: {arch!r} is not a CUDA architecture such as 9.0 or 9.0a")
    want, got = (int(built[1]), int(built[2])), (int(have[1]), int(have[2]))
    if built[3] == "a":
        return got == want
    if built[4]:
        return got >= want
    return got[0] == want[0] and got[1] >= want[1]
