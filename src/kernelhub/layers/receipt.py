"""A saved report checked again, here: are the kernels that it names there, and are their bytes what it says?

Nothing of them is imported, and nothing is measured: that takes the model (`kernelize(..., verify=True, refresh=True)`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kernelhub.core.refs import KernelRef, RepoId, Revision, is_commit
from kernelhub.errors import IntegrityError, InvalidMetadata, InvalidReference, KernelHubError, UntrustedKernel
from kernelhub.hub.client import Hub
from kernelhub.hub.sources.local import local_source
from kernelhub.hub.verify import verify
from kernelhub.layers.report_values import KernelReport

SAME, DIFFERENT, UNCHECKED = "same", "different", "not checked"


@dataclass(frozen=True)
class CheckedKernel:
    """A kernel that a report names, how many of its layers run it, and what became of it here: `state` and `reason`."""

    repository: str
    commit: str | None
    variant: str | None
    digest: str | None
    layers: int
    state: str
    reason: str = ""


def check_report(report: KernelReport, hub: Hub) -> tuple[CheckedKernel, ...]:
    """Each kernel of the report, fetched by its commit and hashed.

    `different` are those whose bytes are not what the report says, or what was published, and those that were revoked;
    `not checked` those that cannot be had here.
    """
    named = Counter((row.repository or "", row.commit, row.variant, row.digest) for row in report.kernels)
    return tuple(CheckedKernel(*kernel, count, *_state(hub, *kernel)) for kernel, count in named.items())


def _state(hub: Hub, repository: str, commit: str | None, variant: str | None, digest: str | None) -> tuple[str, str]:
    if variant is None or digest is None:
        return UNCHECKED, "the report does not say which variant, or not its digest"
    try:
        found = _at_commit(hub, repository, commit, variant) if commit is not None else _in_folder(repository, variant)
    except (IntegrityError, UntrustedKernel) as error:
        return DIFFERENT, error.message.partition("\n")[0]
    except (KernelHubError, OSError) as error:
        return UNCHECKED, getattr(error, "message", str(error)).partition("\n")[0]
    if found is None:
        return UNCHECKED, "it was compiled there, from source: other compilers give other bytes"
    return (SAME, "") if found == digest else (DIFFERENT, f"here it has the digest {found}")


def _at_commit(hub: Hub, repository: str, commit: str, variant: str) -> str | None:
    if not is_commit(commit):
        raise InvalidMetadata(f"{commit!r:.60} is no commit")
    return hub.digest_of(KernelRef(RepoId.parse(repository), Revision(commit)), variant)


def _in_folder(folder: str, variant: str) -> str | None:
    """The digest of a kernel that was in a folder of the user's own, where the folder is here too."""
    if not Path(folder).is_absolute() or not Path(folder).is_dir():
        raise InvalidReference(f"it was in the folder {folder!r:.200}, which is not here")
    source, repo = local_source(Path(folder))
    place = source.locate(repo, variant)
    if place is None:
        raise InvalidReference(f"{folder} has no {variant}")
    return verify(place).digest.text
