"""`KernelConfig`: which kernels a model gets, as people write it down.

>>> config = KernelConfig({"RMSNorm": "kernelhub/norm:RMSNorm"})
>>> print(config.to_text(), end="")
{
  "inherit_mapping": true,
  "kernel_mapping": {
    "RMSNorm": "kernelhub/norm:RMSNorm"
  },
  "schema_version": 1,
  "use_local_kernel": false
}
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelhub.config import document, places
from kernelhub.config.document import Grants
from kernelhub.config.written import Kernel, Reading, missing_folders, nearest, read
from kernelhub.core.refs import RepoId
from kernelhub.errors import InvalidReference, KernelHubWarning, context
from kernelhub.layers.device import Device
from kernelhub.layers.mapping import use_kernel_mapping
from kernelhub.layers.mode import Mode, serving
from kernelhub.layers.repositories import LayerRepository
from kernelhub.settings import Settings
from kernelhub.warning import warn

if TYPE_CHECKING:
    from torch import nn

_MARK = (
    "Layers are marked with use_kernel_forward_from_hub or replace_kernel_forward_from_hub; those of transformers' models "
    "with kernelhub.integrations.transformers.mark(model)."
)


class KernelConfig:
    """Which kernel for which layer, in short: `KernelConfig({"RMSNorm": "org/repo:Layer"})`.

    A value is `"org/repo:Layer"` (version 1), `"org/repo@v2:Layer"`, `"org/repo@<revision>:Layer"`, a pair of
    `"org/repo:Layer"` and `{"version" or "revision": ..., "trust_remote_code": bool}`, or a dict from device types to
    those. A key `(("RMSNorm", "layers.*.norm"), ("MLP", "layers.*.mlp"))` stands for children of one module that one kernel
    computes. With `use_local_kernel` a value is `"/absolute/path:Layer"`, or a dict from device types to such. What is not said is
    taken from the model: its devices, and its mode. With `inherit_mapping=False` no other registrations count.
    """

    def __init__(
        self,
        kernel_mapping: Mapping[str, Any] | None = None,
        use_local_kernel: bool = False,
        inherit_mapping: bool = True,
    ) -> None:
        self.use_local_kernel = use_local_kernel
        self.inherit_mapping = inherit_mapping
        self.registered_layer_names: dict[str, str] = {}
        self.kernel_mapping = {} if kernel_mapping is None else kernel_mapping

    @property
    def kernel_mapping(self) -> dict[str, Any]:
        """The mapping: as it was written, and after `create_compatible_mapping` what came of it."""
        mapping: dict[str, Any] = self._mapping
        return mapping

    @kernel_mapping.setter
    def kernel_mapping(self, mapping: Mapping[str, Any]) -> None:
        # What is no dict is kept too: `sanitize_kernel_mapping` says so, together with everything else.
        self._mapping: Any = dict(mapping) if isinstance(mapping, Mapping) else mapping
        self._written: Any = self._mapping
        self._made: dict[str, Any] | None = None

    def sanitize_kernel_mapping(self, model: nn.Module) -> None:
        """Check what was written against `model`, and fill `registered_layer_names`.

        Raises `InvalidReference` [ValueError], which lists every problem: its place in the mapping, what was found there,
        and the nearest name that would have been right.
        """
        self.store_registered_layer_names(model)
        reading = self._read()
        registered = sorted(set(self.registered_layer_names.values()))
        unknown = [
            f"kernel_mapping: no layer of {type(model).__name__} is registered as {name!r}{nearest(name, registered)}"
            for name in self._names(str)
            if name not in registered
        ]
        elsewhere = [problem for key in self._names(tuple) for problem in _not_there(model, key)]
        problems = [*unknown, *elsewhere, *reading.problems, *missing_folders(reading.kernels)]
        if problems:
            known = f"It has {', '.join(registered)}." if registered else "It has no kernel-aware layers."
            raise _invalid(problems, f"{known} {_MARK}" if unknown else None)

    def create_compatible_mapping(self, model: nn.Module, compile: bool = False) -> dict[str, Any]:
        """`{layer name: {device type: {mode: repository}}}` for `model` as it is now; also kept as `.kernel_mapping`.

        Devices are those of the model's kernel-aware layers, the mode is its training state, with `| TORCH_COMPILE` where
        `compile` says so. Kernels written for other devices are left out. It always starts from what was written, so it
        can be called again when the model has moved or changed its mode.

        Raises `InvalidReference` [ValueError] for a malformed mapping, or where no device can be told.
        """
        return self._create(model, _mode(model, compile))

    def update_kernel(
        self,
        repo_id: str,
        registered_name: str,
        layer_name: str,
        device: str,
        mode: Mode,
        revision: str | None = None,
        version: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Set the kernel of one layer for one device and mode, beside those of others that were set in this way.

        Version 1 where neither `version` nor `revision` is given. Raises `InvalidReference` [ValueError] for a name,
        device or mode that cannot be.
        """
        if not isinstance(mode, Mode):
            raise InvalidReference(f"{mode!r} is not a Mode", hint="Such as Mode.INFERENCE.")
        if version is None and revision is None and "@" not in repo_id:
            version = 1
        repository = LayerRepository(
            repo_id, layer_name=layer_name, revision=revision, version=version, trust_remote_code=trust_remote_code
        )
        written, kind = self._current(), Device(device).type
        before = written.get(registered_name)
        devices = dict(before) if isinstance(before, Mapping) else {}
        there = devices.get(kind)
        devices[kind] = {**there, mode: repository} if isinstance(there, Mapping) else {mode: repository}
        self.kernel_mapping = {**written, registered_name: devices}

    def store_registered_layer_names(self, model: nn.Module) -> None:
        """Fill `registered_layer_names`: `{module path: layer name}`, of functions `{path.name: name}`."""
        from kernelhub.layers.survey import survey

        self.registered_layer_names = {site.path: site.aware.layer_name for site in survey(model).sites}

    def apply(
        self, model: nn.Module, mode: Mode | None = None, compile: bool = False, **kernelize_options: Any
    ) -> nn.Module:
        """Check the mapping, make it for `model`, and kernelize the model with it; returns the same model.

        `mode` None is the model's training state. The other options are those of `kernelize`. Raises what
        `sanitize_kernel_mapping` and `kernelize` raise.
        """
        from kernelhub.layers.kernelize import kernelize

        wanted = _mode(model, compile) if mode is None else (mode | Mode.TORCH_COMPILE if compile else mode)
        serving(wanted)
        self.sanitize_kernel_mapping(model)
        self._create(model, wanted)
        # Those for other devices too: where there is none for a layer's, the reason says for which there are.
        mapping = _nested(self._read().kernels, _devices(model), wanted, others=True)
        with use_kernel_mapping(mapping, inherit_mapping=self.inherit_mapping):
            return kernelize(model, mode=wanted, **kernelize_options)

    # Saved and loaded

    def to_dict(self) -> dict[str, Any]:
        """What was written, in JSON values. Raises `InvalidReference` for what cannot be saved."""
        return {
            "schema_version": document.SCHEMA_VERSION,
            **document.mapping_to_json(self._current()),
            "use_local_kernel": self.use_local_kernel,
            "inherit_mapping": self.inherit_mapping,
        }

    def to_text(self) -> str:
        """`to_dict` as the text of a kernel_config.json: sorted, the same bytes for the same config."""
        return document.to_text(self.to_dict())

    @classmethod
    def from_dict(
        cls, value: Mapping[str, Any], *, trust_remote_code: bool = False, use_local_kernel: bool = False
    ) -> KernelConfig:
        """The config that `to_dict` was made of.

        The value grants nothing: that it trusts kernels, and the folders it names, count only where `trust_remote_code`
        and `use_local_kernel` say so here; otherwise a warning names what was left out. Raises `InvalidMetadata`
        [ValueError] for what is no such value.
        """
        return cls._from(value, Grants(trust_remote_code, use_local_kernel), "a kernel config")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write kernel_config.json into `folder`, which is made where it is not there; the file's path."""
        return places.write_folder(Path(folder), self.to_text())

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | os.PathLike[str],
        *,
        hub: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        use_local_kernel: bool = False,
    ) -> KernelConfig:
        """Read kernel_config.json from a folder, or from the repository `org/name`.

        The repository is one on the Hugging Face Hub (at `revision`), or one in `hub`: a folder, `https://`, `s3://`. The
        file grants nothing, see `from_dict`. Raises `KernelNotFound` [FileNotFoundError], `HubUnavailable` [OSError],
        `InvalidMetadata` [ValueError].
        """
        name = os.fspath(folder_or_repo)
        if hub is None and (Path(name).is_dir() or not isinstance(folder_or_repo, str)):
            data = places.read_folder(Path(name))
        else:
            data = _from_hub(name, hub, revision, token)
        with context(name):
            return cls._from(document.parse_text(data), Grants(trust_remote_code, use_local_kernel), name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        hub: str | None = None,
        commit_message: str = "Upload kernel_config.json",
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Write kernel_config.json into the repository `org/name`; the address of what was written.

        The repository is one on the Hugging Face Hub, made where it is not there (`private`, `token` and
        `commit_message` are for that), or one in `hub`: a folder or `s3://`, as `kernelhub publish` takes it. Raises
        `InvalidReference` [ValueError], `HubUnavailable` [OSError].
        """
        repo, text = RepoId.parse(repo_id), self.to_text()
        if hub is not None:
            return places.write_hub(hub, repo, text)
        return places.write_hugging_face(repo, text, commit_message, private, token, Settings.from_env())

    @classmethod
    def _from(cls, value: object, grants: Grants, where: str) -> KernelConfig:
        found = document.from_json(value, grants)
        if found.warning:
            warn(f"{where}: {found.warning}", KernelHubWarning)
        return cls(found.mapping, found.use_local_kernel, found.inherit_mapping)

    def __eq__(self, other: object) -> bool:
        """Whether the same was written: pairs compare as lists, repositories as their text."""
        if not isinstance(other, KernelConfig):
            return NotImplemented
        try:
            return self.to_dict() == other.to_dict()
        except InvalidReference:  # of what cannot be saved, the values themselves compare
            flags = (self.use_local_kernel, self.inherit_mapping) == (other.use_local_kernel, other.inherit_mapping)
            return flags and bool(self._current() == other._current())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"KernelConfig({self._current()!r}, use_local_kernel={self.use_local_kernel}, "
            f"inherit_mapping={self.inherit_mapping})"
        )

    # What was written, and what was made of it

    def _current(self) -> Any:
        """What was written, with what was changed in `kernel_mapping` itself since it was made."""
        made = self._made
        if made is None:
            return self._written
        kept = {name: value for name, value in self._written.items() if name in self._mapping or name not in made}
        changed = {name: value for name, value in self._mapping.items() if made.get(name) != value}
        return {**kept, **changed}

    def _names(self, kind: type) -> list[Any]:
        """The keys of one kind: layers' names, or keys of several layers."""
        written = self._current()
        return [name for name in written if isinstance(name, kind)] if isinstance(written, Mapping) else []

    def _read(self) -> Reading:
        return read(self._current(), local=self.use_local_kernel)

    def _create(self, model: nn.Module, mode: Mode) -> dict[str, Any]:
        written, reading = self._current(), self._read()
        if reading.problems:
            raise _invalid(reading.problems, None)
        mapping = _nested(reading.kernels, _devices(model), mode)
        self._written, self._mapping, self._made = written, mapping, copy.deepcopy(mapping)
        return mapping


def _invalid(problems: list[str], hint: str | None) -> InvalidReference:
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"the kernel mapping has {count}:", *(f"    {problem}" for problem in problems)]
    return InvalidReference("\n".join(lines), hint=hint)


def _from_hub(name: str, hub: str | None, revision: str | None, token: str | bool | None) -> bytes:
    try:
        repo = RepoId.parse(name)
    except InvalidReference as error:
        raise InvalidReference(
            f"{name!r} is neither a folder nor a repository", hint='Expected the path of a folder, or "org/name".'
        ) from error
    if hub is None:
        return places.read_hugging_face(repo, revision, token, Settings.from_env())
    if revision is not None:
        raise InvalidReference(
            f"revision={revision!r}: a kernel config in a hub's folder has no revisions", hint="Leave it out."
        )
    return places.read_hub(hub, repo, Settings.from_env())


def _not_there(model: nn.Module, key: Any) -> list[str]:
    """What is wrong with a key of several layers, beside the model."""
    from kernelhub.layers.fusion import find
    from kernelhub.layers.keys import check_key
    from kernelhub.layers.survey import uncompiled

    if check_key(key):
        return []  # told where the mapping is read
    named = find(uncompiled(model), key)
    return [f"kernel_mapping[{key!r}]: {problem}" for problem in (*named.problems, named.nothing) if problem]


def _mode(model: nn.Module, compile: bool) -> Mode:
    from kernelhub.layers.survey import uncompiled

    mode = Mode.TRAINING if uncompiled(model).training else Mode.INFERENCE
    return mode | Mode.TORCH_COMPILE if compile else mode


def _devices(model: nn.Module) -> list[str]:
    """The device types that the model's kernel-aware layers run on; of a model without any, where its parameters lie."""
    from kernelhub.layers.survey import Devices, device_type, survey

    found = survey(model)
    devices = Devices(found.tree)
    own = [device for site in found.sites if (device := devices.of(site.at)) is not None]
    all_devices = own or [parameter.device for parameter in model.parameters()]
    return list(dict.fromkeys(device_type(device) for device in all_devices if device.type != "meta"))


def _nested(kernels: list[Kernel], devices: list[str], mode: Mode, *, others: bool = False) -> dict[str, Any]:
    """The kernels by name, device and mode, for these devices; with `others` those written for other devices too."""
    nested: dict[Any, dict[str, dict[Mode, Any]]] = {}
    for kernel in kernels:
        if kernel.device is None and not devices:
            raise InvalidReference(
                f"{kernel.where}: the model has no parameters, so its device cannot be told",
                hint='Write the device: {"RMSNorm": {"cuda": "org/repo:Layer"}}.',
            )
        wanted = devices if kernel.device is None else [kernel.device]
        for device in wanted:
            if others or device in devices or not devices:
                named = kernel.repositories if kernel.others else kernel.repository
                nested.setdefault(kernel.name, {}).setdefault(device, {})[kernel.mode or mode] = named
    return nested
