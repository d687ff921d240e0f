"""Does a ref go forward? A hub that names an older commit than before brings back what was mended since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernelhub.core.manifest import Manifest

# How many commits may lie between two looks at a ref; each is a small file to ask for.
MAX_STEPS = 200

# How many commits of a ref are remembered.
MAX_BEFORE = 100


def goes_back(
    known: str, commit: str, before: Sequence[str], manifest_of: Callable[[str], Manifest | None]
) -> str | None:
    """Why a ref that was `known`, and before that `before`, must not become `commit` unasked; None where it may.

    A commit names its parent, and its own name is a hash over that: a commit from which parents lead to `known` was made
    after it, and nobody can make an older one look so. Where some of those between are not to be had (`manifest_of`
    gives None), the time in the manifest decides. Hubs without manifests are known to go back only to what was seen.
    """
    if commit in before:
        return "is what it was before"
    newest = manifest_of(commit)
    if newest is None:
        return None
    parent = newest.parent
    for _ in range(MAX_STEPS):
        if parent == known:
            return None
        if parent is None:
            return f"was published {newest.time} and does not come after that"
        manifest = manifest_of(parent)
        if manifest is None:
            break
        parent = manifest.parent
    was = manifest_of(known)
    if was is not None and was.time < newest.time:
        return None
    return f"was published {newest.time} and cannot be shown to come after that"


def remembered(before: Sequence[str], known: str | None, commit: str, *, back: bool = False) -> tuple[str, ...]:
    """What a ref was before it is `commit`, where it was `known` until now; going `back` on purpose forgets the rest."""
    if known in (None, commit):
        return tuple(before)
    line = list(before) if back else [*before, known]
    kept = line[: line.index(commit)] if commit in line else line
    return tuple(kept)[-MAX_BEFORE:]
