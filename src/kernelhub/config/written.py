"""What people write in a `KernelConfig`'s mapping, read into repositories; every problem is found in one go.

>>> reading = read({"RMSNorm": {"cuda": "org/norm:RMSNorm", "cudaa": "org/norm:RMSNorm"}}, local=False)
>>> [str(kernel.repository) for kernel in reading.kernels]
['org/norm@v1:RMSNorm']
>>> print(*reading.problems)
kernel_mapping['RMSNorm']: 'cudaa' is not a device type (cpu, cuda, mps, neuron, npu, rocm, tpu, xpu); did you mean 'cuda'?
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from kernelhub.core.refs import KernelRef, Revision, Version
from kernelhub.errors import InvalidReference
from kernelhub.layers.device import DEVICE_BACKENDS
from kernelhub.layers.keys import check_key
from kernelhub.layers.mapping import Name
from kernelhub.layers.mode import Mode
from kernelhub.layers.repositories import LayerRepository, LocalLayerRepository

_OPTIONS = ("version", "revision", "trust_remote_code")
_FORMS = '"org/repo:Layer", ("org/repo:Layer", {"version": 1}), a list of those, or a dict from device types to those'
_LOCAL_FORMS = '"/absolute/path:Layer", a list of such, or a dict from device types to such'


@dataclass(frozen=True)
class Kernel:
    """One kernel of a mapping, for a layer or for several as one. `device` and `mode` are None where they were left to the model. `where` it stood."""

    name: Name
    device: str | None
    mode: Mode | None
    repository: LayerRepository | LocalLayerRepository
    where: str
    others: tuple[LayerRepository | LocalLayerRepository, ...] = ()

    @property
    def repositories(self) -> list[LayerRepository | LocalLayerRepository]:
        """All that may be taken, in the order in which they were written."""
        return [self.repository, *self.others]


@dataclass
class Reading:
    """What a mapping says, and what is wrong with it: a line for each problem."""

    kernels: list[Kernel] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read(mapping: object, *, local: bool) -> Reading:
    """Read a mapping; `local` says that its kernels are in folders of the user's own. Touches no file."""
    reader = _Reader(local)
    reader.mapping(mapping)
    return reader.reading


def split_local(text: str) -> tuple[str, str] | None:
    """The path and the layer of `"/path:Layer"`; the colon of a Windows drive separates nothing.

    >>> split_local(r"C:\\kernels\\norm:RMSNorm")
    ('C:\\\\kernels\\\\norm', 'RMSNorm')
    >>> split_local(r"C:\\kernels\\norm") is None
    True
    """
    path, colon, layer = text.rpartition(":")
    return (path, layer) if colon and path and layer.isidentifier() else None


def is_pair(value: object) -> bool:
    """Whether the value is a kernel with its options, and not a list of kernels."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], Mapping)


def is_absolute(path: str) -> bool:
    """Whether the path is absolute, as this system or the other one writes it."""
    return PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()


def nearest(found: object, names: Iterable[str]) -> str:
    """`; did you mean 'RMSNorm'?`, where one of the names is near enough; else nothing."""
    by_folded = {name.casefold(): name for name in sorted(names)}
    close = difflib.get_close_matches(str(found).casefold(), by_folded, n=1)
    return f"; did you mean {by_folded[close[0]]!r}?" if close else ""


def missing_folders(kernels: Iterable[Kernel]) -> list[str]:
    """A line for each local kernel whose folder is not there."""
    problems = []
    for kernel in kernels:
        for repository in kernel.repositories:
            path = repository.repo_path if isinstance(repository, LocalLayerRepository) else None
            if path is not None and not path.is_dir():
                problems.append(f"{kernel.where}: {str(path)!r} is not a folder{nearest(path.name, _beside(path))}")
    return problems


def _beside(path: Path) -> list[str]:
    return [child.name for child in path.parent.iterdir() if child.is_dir()] if path.parent.is_dir() else []


@dataclass
class _Reader:
    local: bool
    reading: Reading = field(default_factory=Reading)

    def mapping(self, value: object) -> None:
        if not isinstance(value, Mapping):
            self._problem("kernel_mapping", f"expected a dict from layer names to kernels, got {value!r}")
            return
        for name, kernel in value.items():
            where = f"kernel_mapping[{name!r}]"
            wrong = check_key(name) if isinstance(name, tuple) else ""
            if wrong:
                self._problem(where, wrong)
            elif not isinstance(name, (str, tuple)) or not name:
                self._problem("kernel_mapping", f'{name!r} is not the name of a layer; expected such as "RMSNorm"')
            elif isinstance(kernel, Mapping):
                self._devices(where, name, kernel)
            else:
                self._kernel(where, name, None, None, kernel)

    def _devices(self, where: str, name: Name, devices: Mapping[Any, Any]) -> None:
        if not devices:
            self._problem(where, "there is no kernel in it; expected a dict from device types to kernels")
        for device, kernel in devices.items():
            inner = f"{where}[{device!r}]"
            if device not in DEVICE_BACKENDS:
                known = ", ".join(sorted(DEVICE_BACKENDS))
                self._problem(where, f"{device!r} is not a device type ({known}){nearest(device, DEVICE_BACKENDS)}")
            elif isinstance(kernel, Mapping):
                self._modes(inner, name, device, kernel)
            else:
                self._kernel(inner, name, device, None, kernel)

    def _modes(self, where: str, name: Name, device: str, modes: Mapping[Any, Any]) -> None:
        for mode, kernel in modes.items():
            if isinstance(mode, Mode):
                self._kernel(f"{where}[Mode.{mode}]", name, device, mode, kernel)
            else:
                names = [f"Mode.{member}" for member in Mode]
                self._problem(where, f"{mode!r} is not a Mode{nearest(mode, names)}")

    def _kernel(self, where: str, name: Name, device: str | None, mode: Mode | None, value: object) -> None:
        if isinstance(value, list) and not is_pair(value):
            read = [self._repository(f"{where}[{number}]", item) for number, item in enumerate(value)]
            if not read:
                self._problem(where, "there is no kernel in the list")
        else:
            read = [self._repository(where, value)]
        found = [repository for repository in read if repository is not None]
        if found:
            self.reading.kernels.append(Kernel(name, device, mode, found[0], where, tuple(found[1:])))

    def _repository(self, where: str, value: object) -> LayerRepository | LocalLayerRepository | None:
        kind = LocalLayerRepository if self.local else LayerRepository
        if isinstance(value, kind):
            return value
        if isinstance(value, str):
            return self._local(where, value) if self.local else self._remote(where, value, {})
        if not self.local and isinstance(value, (tuple, list)) and len(value) == 2:
            text, options = value
            if isinstance(text, str) and isinstance(options, Mapping):
                return self._remote(where, text, options, pinned=True)
        self._problem(where, f"expected {_LOCAL_FORMS if self.local else _FORMS}, got {value!r}")
        return None

    def _local(self, where: str, text: str) -> LocalLayerRepository | None:
        parts = split_local(text)
        if parts is None:
            self._problem(where, f'{text!r} names no layer; expected "/absolute/path:Layer"')
        elif not is_absolute(parts[0]):
            hint = f"; did you mean {str(Path(parts[0]).expanduser().absolute())!r}?"
            self._problem(where, f"{parts[0]!r} is not an absolute path{hint}")
        else:
            return LocalLayerRepository(Path(parts[0]), layer_name=parts[1])
        return None

    def _remote(
        self, where: str, text: str, options: Mapping[Any, Any], *, pinned: bool = False
    ) -> LayerRepository | None:
        if is_absolute(text):
            self._problem(where, f"{text!r} is a local path; those need KernelConfig(..., use_local_kernel=True)")
            return None
        before = len(self.reading.problems)
        ref = self._ref(where, text)
        self._check_options(where, options, None if ref is None else ref.pin, pinned=pinned)
        if ref is None or ref.layer is None or len(self.reading.problems) > before:
            return None
        number, revision = options.get("version"), options.get("revision")
        if isinstance(ref.pin, Version):
            number = ref.pin.number
        elif ref.pin is not None:
            revision = str(ref.pin)
        elif revision is None and number is None:
            number = 1
        trust = options.get("trust_remote_code", False)
        return LayerRepository(
            str(ref.repo), layer_name=ref.layer, version=number, revision=revision, trust_remote_code=trust
        )

    def _ref(self, where: str, text: str) -> KernelRef | None:
        try:
            ref = KernelRef.parse(text)
        except InvalidReference as error:
            self._problem(where, f'{error.message}; expected "org/repo:Layer" or "org/repo@v1:Layer"')
            return None
        if ref.layer is None:
            self._problem(where, f'{text!r} names no layer; expected "{ref}:Layer"')
        return ref

    def _check_options(self, where: str, options: Mapping[Any, Any], pin: object, *, pinned: bool) -> None:
        for key in options:
            if key not in _OPTIONS:
                self._problem(where, f"{key!r} is none of {', '.join(_OPTIONS)}{nearest(key, _OPTIONS)}")
        trust = options.get("trust_remote_code", False)
        if not isinstance(trust, bool):
            self._problem(where, f"trust_remote_code must be True or False, got {trust!r}")
        number, revision = options.get("version"), options.get("revision")
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
            self._problem(where, f"version must be a whole number such as 1, got {number!r}")
        if revision is not None:
            self._check_revision(where, revision)
        given = [
            f"{name} {value}" for name, value in (("version", number), ("revision", revision)) if value is not None
        ]
        if pin is not None:
            given.insert(0, f"@{pin} behind the name")
        if len(given) > 1 or (pinned and not given):
            self._problem(where, f"expected exactly one of version and revision, got {' and '.join(given) or 'none'}")

    def _check_revision(self, where: str, revision: object) -> None:
        try:
            if not isinstance(revision, str):
                raise InvalidReference(f"{revision!r} is not a revision")
            Revision.parse(revision)
        except InvalidReference as error:
            self._problem(where, f"{error.message}; expected the name of a branch, a tag or a commit")

    def _problem(self, where: str, fact: str) -> None:
        self.reading.problems.append(f"{where}: {fact}")
