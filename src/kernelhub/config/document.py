"""kernel_config.json: a `KernelConfig` as a file, and what of a file may be believed.

A file is data: who writes it must not thereby decide what code runs here. So what it says about trust, and the folders it
names, count only where the caller says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kernelhub.config.written import is_absolute, is_pair, nearest
from kernelhub.errors import InvalidMetadata, InvalidReference
from kernelhub.layers.keys import check_key
from kernelhub.layers.mode import Mode
from kernelhub.layers.repositories import LayerRepository, LocalLayerRepository

FILE_NAME = "kernel_config.json"
SCHEMA_VERSION = 1
MAX_BYTES = 1024 * 1024

_KEYS = ("fusions", "inherit_mapping", "kernel_mapping", "schema_version", "use_local_kernel")


@dataclass(frozen=True)
class Grants:
    """What the caller lets a file decide: that kernels are trusted, and which folders they are loaded from."""

    trust_remote_code: bool = False
    use_local_kernel: bool = False


# From what was written to JSON


def mapping_to_json(mapping: object) -> dict[str, Any]:
    """The mapping in JSON values: pairs as lists, modes by name, repositories as text; fusions, if any, in a list.

    Raises `InvalidReference` for what cannot be saved.
    """
    if not isinstance(mapping, Mapping):
        raise InvalidReference(f"kernel_mapping: expected a dict from layer names to kernels, got {mapping!r}")
    single: dict[str, Any] = {}
    fusions = []
    for name, value in mapping.items():
        where = f"kernel_mapping[{name!r}]"
        if isinstance(name, str):
            single[name] = _to_json(where, value)
            continue
        wrong = check_key(name) if isinstance(name, tuple) else "a layer's name is text"
        if wrong:
            raise InvalidReference(f"{where}: {wrong}")
        fusions.append({"layers": [list(item) for item in name], "kernel": _to_json(where, value)})
    fusions.sort(key=lambda fusion: fusion["layers"])
    return {"kernel_mapping": single, **({"fusions": fusions} if fusions else {})}


def to_text(document: Mapping[str, Any]) -> str:
    """The file's text: sorted, so that the same config always gives the same bytes."""
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _to_json(where: str, value: object) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, LocalLayerRepository):
        return f"{value.repo_path}:{value.layer_name}"
    if isinstance(value, LayerRepository):
        return _repository_to_json(where, value)
    if isinstance(value, (tuple, list)) and is_pair(value):
        return [value[0], dict(value[1])]
    if isinstance(value, list) and value:
        return [_to_json(f"{where}[{number}]", item) for number, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _to_json(f"{where}[{key!r}]", inner) for key, inner in value.items()}
    raise InvalidReference(f"{where}: {value!r} cannot be saved", hint='Expected such as "org/repo@v1:Layer".')


def _repository_to_json(where: str, repository: LayerRepository) -> Any:
    text, trust = str(repository), repository.trust_remote_code
    if not isinstance(trust, bool):
        raise InvalidReference(
            f"{where}: {trust!r} cannot be saved", hint="Only True and False can; whoever loads the file grants trust."
        )
    return [text, {"trust_remote_code": True}] if trust else text


# From JSON to what would have been written


@dataclass
class _File:
    """A file that is being read. `withheld` are the places where it asked for what was not granted."""

    grants: Grants
    withheld_trust: list[str]
    withheld_paths: list[str]


@dataclass(frozen=True)
class Document:
    """What a file says, after what it may not say was left out; `warning` names that, with what to do."""

    mapping: dict[Any, Any]
    use_local_kernel: bool
    inherit_mapping: bool
    warning: str


def parse_text(text: str | bytes, where: str = FILE_NAME) -> Any:
    """The file's JSON value. Raises `InvalidMetadata`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidMetadata(f"{where} is not JSON: {error}") from error


def from_json(value: object, grants: Grants) -> Document:
    """Read a file's value. Raises `InvalidMetadata`, which names the place, for what `to_dict` never writes."""
    if not isinstance(value, Mapping):
        raise InvalidMetadata(f"a kernel config is an object, got {value!r:.100}")
    _check_schema(value)
    file = _File(grants, [], [])
    mapping = value.get("kernel_mapping", {})
    if not isinstance(mapping, Mapping):
        raise InvalidMetadata(f"kernel_mapping is an object from layer names to kernels, got {mapping!r:.100}")
    read: dict[Any, Any] = {name: _value(file, f"kernel_mapping[{name!r}]", kernel) for name, kernel in mapping.items()}
    for key, kernel in _fusions(value.get("fusions", [])):
        read[key] = _value(file, f"fusions[{key!r}]", kernel)
    local = _flag(value, "use_local_kernel", False)
    return Document(
        {name: kernel for name, kernel in read.items() if kernel is not None},
        local and grants.use_local_kernel,
        _flag(value, "inherit_mapping", True),
        _warning(file),
    )


def _fusions(value: object) -> Iterator[tuple[Any, Any]]:
    """The kernels for several layers, each with its key."""
    if not isinstance(value, list):
        raise InvalidMetadata(f"fusions is a list, got {value!r:.100}")
    seen = set()
    for at, item in enumerate(value):
        if not isinstance(item, Mapping) or set(item) != {"layers", "kernel"} or not isinstance(item["layers"], list):
            raise InvalidMetadata(f"fusions[{at}]: expected an object of layers and kernel, got {item!r:.100}")
        key = tuple(tuple(layer) if isinstance(layer, list) else layer for layer in item["layers"])
        if wrong := check_key(key):
            raise InvalidMetadata(f"fusions[{at}]: {wrong}")
        if key in seen:
            raise InvalidMetadata(f"fusions[{at}]: the same layers again")
        seen.add(key)
        yield key, item["kernel"]


def _check_schema(value: Mapping[Any, Any]) -> None:
    version = value.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InvalidMetadata(
            f"schema_version is {version!r}; this version reads {SCHEMA_VERSION}",
            hint="A newer kernelhub may have written it: upgrade.",
        )
    for key in value:
        if key not in _KEYS:
            raise InvalidMetadata(f"{key!r} is none of {', '.join(_KEYS)}{nearest(key, _KEYS)}")


def _flag(value: Mapping[Any, Any], key: str, default: bool) -> bool:
    flag = value.get(key, default)
    if not isinstance(flag, bool):
        raise InvalidMetadata(f"{key} is true or false, got {flag!r:.100}")
    return flag


def _value(file: _File, where: str, value: object, *, depth: int = 0) -> Any:
    """A kernel, or a dict from devices (and in it from modes) to kernels; None where nothing of it is granted."""
    if isinstance(value, list) and not is_pair(value):
        if not value:
            raise InvalidMetadata(f"{where}: there is no kernel in the list")
        listed = [_kernel(file, f"{where}[{number}]", item) for number, item in enumerate(value)]
        return [kernel for kernel in listed if kernel is not None] or None
    if not isinstance(value, Mapping):
        return _kernel(file, where, value)
    if depth > 1:
        raise InvalidMetadata(f"{where}: expected a kernel, got {value!r:.100}")
    read = {}
    for key, inner in value.items():
        place = f"{where}[{key!r}]"
        kernel = _value(file, place, inner, depth=depth + 1)
        if kernel is not None:
            read[_mode(place, key) if depth else key] = kernel
    return read or (None if value else {})


def _mode(where: str, text: object) -> Mode:
    try:
        first, *others = (Mode[name] for name in str(text).split("|"))
        for other in others:
            first = first | other
    except (KeyError, InvalidReference) as error:
        names = ", ".join(str(mode) for mode in Mode)
        raise InvalidMetadata(f"{where}: {text!r} is not a mode", hint=f"Expected {names}, or two with |.") from error
    return first


def _kernel(file: _File, where: str, value: object) -> Any:
    text, options = (value[0], value[1]) if isinstance(value, list) and is_pair(value) else (value, None)
    if not isinstance(text, str) or not (options is None or isinstance(options, Mapping)):
        raise InvalidMetadata(f'{where}: expected "org/repo:Layer" or a list of it and options, got {value!r:.100}')
    if is_absolute(text) and not file.grants.use_local_kernel:
        file.withheld_paths.append(where)
        return None
    if options is None:
        return text
    kept = dict(options)
    if kept.get("trust_remote_code") and not file.grants.trust_remote_code:
        file.withheld_trust.append(where)
        del kept["trust_remote_code"]
    # A pair without a version or revision is none that people may write, and this one said nothing but trust.
    return (text, kept) if kept else text


def _warning(file: _File) -> str:
    lines = []
    if file.withheld_trust:
        places = ", ".join(file.withheld_trust)
        lines.append(f"it asks for trust in {places}: only you can grant that, with trust_remote_code=True")
    if file.withheld_paths:
        places = ", ".join(file.withheld_paths)
        lines.append(f"it names folders in {places}, which were left out: allow them with use_local_kernel=True")
    return "; ".join(lines)
