"""What a key takes back: a signed, numbered list of keys and commits that no longer count.

Each key has a list of its own in a hub, `revocations/<key id>.json`, so that two publishers do not write one file:

```json
{"revocations": {"layout": 1, "key": "<key id>", "number": 3, "time": "2026-11-21T20:00:00Z",
                 "keys": {"<key id>": "<reason>"}, "commits": {"<40 hex>": "<reason>"}},
 "signatures": [{"key": "<key id>", "ed25519": "<base64, over the canonical JSON of revocations>"}]}
```

A list is only ever added to, and its number counts up, so that a client knows which of two is the older. It keeps what
either says: the same key may have revoked something else in another hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kernelhub.core.canonical import canonical_json
from kernelhub.core.reading import as_object, json_object, typed
from kernelhub.core.refs import is_commit
from kernelhub.core.signatures import Signature, parse_signatures, signatures_to_json
from kernelhub.errors import IntegrityError, InvalidMetadata

LAYOUT = 1

# Room for 50,000 entries with a reason each.
MAX_BYTES = 8 * 1024 * 1024

_KEY_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)


def path_of(key_id: str) -> str:
    """Where a key's list lies in a hub, and in the store."""
    if not is_key_id(key_id):
        raise InvalidMetadata(f"{key_id!r:.80} is not the id of a key", hint="Expected 32 hex digits.")
    return f"revocations/{key_id}.json"


def is_key_id(text: str) -> bool:
    return bool(_KEY_ID.fullmatch(text))


@dataclass(frozen=True)
class Revocations:
    """The list of the key with the id `key`. `keys` and `commits` map what no longer counts to the reason.

    `more` has the keys that are unknown here, so that what is signed stays what it is.
    """

    key: str
    number: int = 0
    time: str = ""
    keys: Mapping[str, str] = field(default_factory=dict, hash=False)
    commits: Mapping[str, str] = field(default_factory=dict, hash=False)
    more: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    @classmethod
    def from_raw(cls, raw: Any) -> Revocations:
        """The value of a list's object. Raises `InvalidMetadata`, which names the key."""
        where = "revocations"
        raw = as_object(raw, where)
        if typed(raw, "layout", int, where) != LAYOUT:
            raise InvalidMetadata(
                f"{where}: layout: expected {LAYOUT}, got {raw['layout']}",
                hint="A newer kernelhub made it: pip install --upgrade kernelhub",
            )
        number = typed(raw, "number", int, where)
        if number < 1:
            raise InvalidMetadata(f"{where}: number: expected 1 or more, got {number}")
        keys, commits = (as_object(raw.get(name), f"{where}: {name}") for name in ("keys", "commits"))
        for name, entries, fits in (("keys", keys, is_key_id), ("commits", commits, is_commit)):
            for entry, reason in entries.items():
                if not fits(entry) or not isinstance(reason, str):
                    raise InvalidMetadata(f"{where}: {name}: {entry!r:.80} is none, or has no reason")
        key, time = typed(raw, "key", str, where), typed(raw, "time", str, where)
        known = ("layout", "key", "number", "time", "keys", "commits")
        return cls(key, number, time, keys, commits, {name: value for name, value in raw.items() if name not in known})

    def to_json(self) -> dict[str, Any]:
        return {
            **self.more,
            "layout": LAYOUT,
            "key": self.key,
            "number": self.number,
            "time": self.time,
            "keys": dict(self.keys),
            "commits": dict(self.commits),
        }

    @property
    def payload(self) -> bytes:
        """What the signature is over."""
        return canonical_json(self.to_json())

    def merged(self, other: Revocations) -> Revocations:
        """All that two lists of the key take back; the rest is that of the later one.

        A list is only ever added to. So one that lacks what another has was written by somebody who did not know that one:
        for another hub, where a hub had lost it, or with a key that is not only its owner's. Nothing is taken back by that.
        """
        earlier, later = sorted((self, other), key=lambda item: item.number)
        return replace(later, keys={**later.keys, **earlier.keys}, commits={**later.commits, **earlier.commits})

    def added(self, time: str, *, keys: Mapping[str, str], commits: Mapping[str, str]) -> Revocations:
        """The next list: this one, and these. What it has already keeps its first reason."""
        return replace(
            self,
            number=self.number + 1,
            time=time,
            keys={**keys, **self.keys},
            commits={**commits, **self.commits},
        )


@dataclass(frozen=True)
class RevocationsDocument:
    """The file: a list and its signature."""

    revocations: Revocations
    signatures: tuple[Signature, ...] = ()

    @classmethod
    def parse(cls, data: bytes, key_id: str) -> RevocationsDocument:
        """Read the list of a key. Raises `InvalidMetadata`, or `IntegrityError` where it is another key's."""
        raw = json_object(data, "the revocation list", MAX_BYTES)
        found = cls(Revocations.from_raw(raw.get("revocations")), parse_signatures(raw))
        if found.revocations.key != key_id:
            raise IntegrityError(f"the revocation list of {key_id} is one of {found.revocations.key!r:.80}")
        return found

    def to_bytes(self) -> bytes:
        value = {"revocations": self.revocations.to_json(), "signatures": signatures_to_json(self.signatures)}
        return canonical_json(value) + b"\n"
