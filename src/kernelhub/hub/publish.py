"""Publish a kernel repository's folder into a hub in a folder or bucket, so that no reader sees half of it.

The commits of a ref are a chain, and a place in it is claimed: `commits/<parent>.next.<ref>` is created exclusively and
holds the whole manifest document, so whoever finds a claim can finish it. A publisher

1. writes `hub.json` where there is none, and its blobs, which nobody sees yet;
2. walks from the ref along the claims that are there, finishing each: it writes the claim's manifest, then moves the ref;
3. claims the place after the last. Who loses that race finishes the winner's publish and is told who won;
4. finishes its own claim, and walks on along claims made since, so that of two who move the ref at once the slower one
   does not leave it behind.

A publisher that is killed before 3 has published nothing; after it, the next one finishes its work.
"""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path

from kernelhub.core.canonical import sha256_hex
from kernelhub.core.manifest import (
    MAX_BYTES,
    Manifest,
    ManifestDocument,
    ManifestVariant,
    RefFile,
    hub_file,
    parse_hub_file,
)
from kernelhub.core.paths import safe_path
from kernelhub.core.refs import RepoId, is_commit, parse_pin
from kernelhub.core.signatures import MAX_SIGNATURES
from kernelhub.errors import (
    HubUnavailable,
    IntegrityError,
    InvalidMetadata,
    InvalidReference,
    KernelNotFound,
    PublishConflict,
    context,
)
from kernelhub.hub.addresses import shown
from kernelhub.hub.archive import pack, same_files
from kernelhub.hub.declared import declared_layers
from kernelhub.hub.files import WritableFiles, open_files
from kernelhub.hub.signing import Signer
from kernelhub.hub.sources.layout import blob_path
from kernelhub.hub.sources.project import EMBEDDED_ORG
from kernelhub.hub.unpublished import check_repository, read_beside, read_variant, variant_folders

_SMALL = 64 * 1024
_MAX_BLOB = 16 * 1024**3
# How often to sign again where somebody else signs at the same time.
_SIGN_TRIES = 5


@dataclass(frozen=True)
class Published:
    """What came of a publish: the commit that the ref is now, whether it is a new one, and the key that signed it."""

    repo: RepoId
    ref: str
    commit: str
    changed: bool
    signed_by: str | None = None


def publish(
    folder: Path, hub_url: str, repo: RepoId, *, epoch: int, ref: str | None = None, signer: Signer | None = None
) -> Published:
    """Publish what lies in `folder` (`build/<variant>/...`) as the next commit of `ref` (None: `v<version>`).

    `epoch` is the manifest's time in seconds since 1970: the clock's, or `SOURCE_DATE_EPOCH`. Beside the variants go the
    card (`CARD.md` or `README.md`), `benchmarks/`, and where there is a `build.toml` the source. A variant without a
    digest is given one. Publishing what the ref has already changes nothing, and does not take back a yank either; with
    a `signer` that commit is signed.

    Raises `InvalidMetadata` or `IntegrityError` for a folder that is not fit to be published, before anything is
    written; `PublishConflict` where somebody else was faster; `InvalidReference` for a hub that cannot be written;
    `HubUnavailable`.
    """
    if repo.org == EMBEDDED_ORG:
        raise InvalidReference(
            f"{repo} cannot be published: nobody would find it",
            hint=f"What {EMBEDDED_ORG}/... names is looked for inside the package alone. Publish under another name.",
        )
    with context(f"publishing {folder} to {shown(hub_url)}"):
        version = check_repository(folder)
        chain = _Chain(_writable(hub_url), repo, _ref_name(ref or f"v{version}"))
        return _publish(chain, folder, version, time_text(epoch), signer)


def sign(hub_url: str, repo: RepoId, commit: str, signer: Signer) -> None:
    """Add a signature to a commit in a hub. The commit's name is a hash of it all, so that is what is vouched for.

    Raises `KernelNotFound` where there is no such commit, and as `publish` does.
    """
    with context(f"signing {repo} at {commit} in {shown(hub_url)}"):
        _add_signature(_writable(hub_url), repo, commit, signer)


def yank(hub_url: str, repo: RepoId, ref: str, reason: str | None) -> RefFile:
    """Withdraw what `ref` is now: nobody new gets it, and who has it locked is warned. `reason` None takes it back.

    Raises `KernelNotFound` where there is no such ref, `PublishConflict` where something was published meanwhile.
    """
    with context(f"withdrawing {repo}@{ref} from {shown(hub_url)}"):
        chain = _Chain(_writable(hub_url), repo, _ref_name(ref))
        tip = chain.settle()
        if tip is None:
            raise KernelNotFound(f"{repo} has no {ref}")
        yanked = RefFile(tip.commit, reason)
        chain.files.replace(chain.ref_path, yanked.to_bytes())
        now = chain.settle(tip)
        if now is not None and now.commit != tip.commit:
            raise PublishConflict(f"{ref} is a newer commit by now: {now.commit}", winner=now.commit)
        return yanked


def put_file(hub_url: str, repo: RepoId, name: str, data: bytes) -> str:
    """Write a file of the repository's own, beside its commits and apart from them; the path it has in the hub.

    Such a file has no history: who writes last, wins. Raises as `publish` does.
    """
    path = f"{repo}/{safe_path(name)}"
    with context(f"writing {path} to {shown(hub_url)}"):
        writable_hub(hub_url).replace(path, data)
    return path


def _publish(chain: _Chain, folder: Path, version: int, time: str, signer: Signer | None) -> Published:
    files, repo, ref = chain.files, chain.repo, chain.ref
    _ensure_hub(files)
    draft = _draft(chain, folder, version, time)
    tip = chain.settle()
    if tip is not None and _same(files, draft, tip, to_sign=signer is not None):
        return _unchanged(chain, tip, signer)
    ours = ManifestDocument(dataclasses.replace(draft, parent=tip.commit if tip else None))
    if signer is not None:
        ours = ours.signed(signer.sign(ours.payload))
    winner = chain.claim(ours)
    chain.settle(tip)
    if winner.commit == ours.manifest.commit:
        if signer is not None:  # somebody may have claimed the very same before, unsigned
            _add_signature(files, repo, winner.commit, signer)
        return Published(repo, ref, winner.commit, changed=True, signed_by=signer.public.id if signer else None)
    if _same(files, draft, winner, to_sign=signer is not None):
        return _unchanged(chain, winner, signer)
    raise PublishConflict(
        f"{repo}@{ref}: somebody else published {winner.commit} first",
        winner=winner.commit,
        hint="Look at what they published; publishing again puts yours after theirs.",
    )


def _unchanged(chain: _Chain, manifest: Manifest, signer: Signer | None) -> Published:
    """The ref has this content already; it is signed where it was to be."""
    if signer is None:
        return Published(chain.repo, chain.ref, manifest.commit, changed=False)
    _add_signature(chain.files, chain.repo, manifest.commit, signer)
    return Published(chain.repo, chain.ref, manifest.commit, changed=False, signed_by=signer.public.id)


def _add_signature(files: WritableFiles, repo: RepoId, commit: str, signer: Signer) -> None:
    """Sign a commit. Of two who sign at once one may overwrite the other, who then signs again."""
    path = _manifest_path(repo, commit)
    for _ in range(_SIGN_TRIES):
        data = files.read(path, MAX_BYTES)
        if data is None:
            raise KernelNotFound(f"{files.name} has no {path}")
        with context(path):
            document = ManifestDocument.parse(data).checked(repo, commit)
        signature = signer.sign(document.payload)
        if signature in document.signatures:
            return
        others = tuple(item for item in document.signatures if item.key != signature.key)
        if len(others) >= MAX_SIGNATURES:
            raise InvalidMetadata(f"{path} has {len(others)} signatures of other keys; more are not read")
        files.replace(path, dataclasses.replace(document, signatures=(*others, signature)).to_bytes())
    raise PublishConflict(f"others sign {commit} at the same time, again and again", winner=commit)


@dataclass(frozen=True)
class _Chain:
    """The commits of a ref, one after the other."""

    files: WritableFiles
    repo: RepoId
    ref: str

    @property
    def ref_path(self) -> str:
        return f"{self.repo}/refs/{self.ref}"

    def settle(self, known: Manifest | None = None) -> Manifest | None:
        """Finish every claim there is after the ref (after `known`, where that is later); the last commit, if any.

        Manifests first, then the ref, once; and again for what was claimed until then.
        """
        tip = moved = known or self._tip()
        while True:
            while (claimed := self._claimed_after(tip.commit if tip else None)) is not None:
                tip = claimed.manifest
                self.files.create(self._manifest_path(tip.commit), claimed.to_bytes())
            if tip is None or tip is moved:
                return tip
            if self._ref() != tip.commit:
                self.files.replace(self.ref_path, RefFile(tip.commit).to_bytes())
            moved = tip

    def claim(self, document: ManifestDocument) -> Manifest:
        """Take the place after the manifest's parent; who has it: this manifest, or another that was faster."""
        if self.files.create(self._claim_path(document.manifest.parent), document.to_bytes()):
            return document.manifest
        winner = self._claimed_after(document.manifest.parent)
        if winner is None:
            raise HubUnavailable(
                f"{self.files.name} says that a file is there, and that it is not", hub=self.files.name
            )
        return winner.manifest

    def _ref(self) -> str | None:
        data = self.files.read(self.ref_path, _SMALL)
        if data is None:
            return None
        with context(self.ref_path):
            return RefFile.parse(data).commit

    def _tip(self) -> Manifest | None:
        commit = self._ref()
        if commit is None:
            return None
        path = self._manifest_path(commit)
        data = self.files.read(path, MAX_BYTES)
        if data is None:
            raise HubUnavailable(
                f"{self.ref_path} names a commit whose manifest is not there: {path}", hub=self.files.name
            )
        with context(path):
            return ManifestDocument.parse(data).checked(self.repo, commit).manifest

    def _claimed_after(self, parent: str | None) -> ManifestDocument | None:
        path = self._claim_path(parent)
        data = self.files.read(path, MAX_BYTES)
        if data is None:
            return None
        with context(path):
            document = ManifestDocument.parse(data)
            manifest = document.manifest
            if manifest.repo != self.repo or manifest.parent != parent:
                raise IntegrityError(f"the claim is one of {manifest.repo} after {manifest.parent or 'nothing'}")
            return document

    def _manifest_path(self, commit: str) -> str:
        return _manifest_path(self.repo, commit)

    def _claim_path(self, parent: str | None) -> str:
        return f"{self.repo}/commits/{parent or 'null'}.next.{self.ref}"


def _manifest_path(repo: RepoId, commit: str) -> str:
    return f"{repo}/commits/{commit}.json"


def _same(files: WritableFiles, draft: Manifest, manifest: Manifest, *, to_sign: bool = False) -> bool:
    """Whether the manifest has the draft's content already. An archive may differ in how it is compressed only.

    What is `to_sign` says nothing else either: the publisher vouches for every word of it, whoever wrote it.
    """
    if to_sign and _claims(draft) != _claims(manifest):
        return False
    if (draft.version, draft.card, draft.variants.keys()) != (
        manifest.version,
        manifest.card,
        manifest.variants.keys(),
    ):
        return False
    pairs = [(draft.source, manifest.source), (draft.benchmarks, manifest.benchmarks)]
    for name, variant in draft.variants.items():
        theirs = manifest.variants[name]
        if variant.metadata != theirs.metadata:
            return False
        pairs.append((variant.archive, theirs.archive))
    return all(_same_archive(files, ours, theirs) for ours, theirs in pairs)


def _claims(manifest: Manifest) -> dict[str, object]:
    """What a manifest says, but for when and after what it was published, and how archives are compressed."""
    value = manifest.to_json()
    variants = {name: {**item, "archive": None, "size": None} for name, item in value["variants"].items()}
    return {**value, "variants": variants, **dict.fromkeys(("parent", "time", "source", "benchmarks"))}


def _same_archive(files: WritableFiles, ours: str | None, theirs: str | None) -> bool:
    if ours is None or theirs is None or ours == theirs:
        return ours == theirs
    blobs = [files.read(blob_path(sha256), _MAX_BLOB) for sha256 in (ours, theirs)]
    return all(blobs) and same_files(blobs[0] or b"", blobs[1] or b"")


def _draft(chain: _Chain, folder: Path, version: int, time: str) -> Manifest:
    """The manifest without its parent; the blobs that it names are written, one variant in memory at a time."""
    files, variants = chain.files, {}
    for path in variant_folders(folder):
        _, contents = read_variant(path)
        archive = pack(contents)
        variants[path.name] = ManifestVariant(
            archive=_write_blob(files, archive),
            size=len(archive),
            metadata=contents["metadata.json"].decode(),
            layers=declared_layers(contents),
        )
    beside = read_beside(folder)
    return Manifest(
        repo=chain.repo,
        version=version,
        parent=None,
        time=time,
        variants=variants,
        card=_write_blob(files, beside.card) if beside.card is not None else None,
        source=_write_blob(files, pack(beside.source)) if beside.source else None,
        benchmarks=_write_blob(files, pack(beside.benchmarks)) if beside.benchmarks else None,
    )


def _writable(hub_url: str) -> WritableFiles:
    files = open_files(hub_url, _no_user_agent)
    if not isinstance(files, WritableFiles):
        raise InvalidReference(
            f"{files.name} cannot be published to: it is read only, or does not write exclusively",
            hint="Publish to a folder or to s3://; a web host serves that.",
        )
    return files


def _no_user_agent() -> str:
    return ""  # folders and object stores are sent none


def writable_hub(hub_url: str) -> WritableFiles:
    """The files of a hub to write to; an empty place becomes one. Raises `InvalidReference` for what is none."""
    files = _writable(hub_url)
    _ensure_hub(files)
    return files


def _ensure_hub(files: WritableFiles) -> None:
    """Make an empty place a hub. Raises `InvalidReference` for one that is neither empty nor a hub."""
    data = files.read("hub.json", _SMALL)
    if data is None and files.names("") and files.read("hub.json", _SMALL) is None:  # it may be there by now
        raise InvalidReference(
            f"{files.name} is not a hub: it is not empty and has no hub.json", hint="Is the address right?"
        )
    if data is None:
        files.create("hub.json", hub_file())
        data = files.read("hub.json", _SMALL) or b""
    with context("hub.json"):
        parse_hub_file(data)


def _write_blob(files: WritableFiles, data: bytes) -> str:
    """Write a blob under its hash, which is returned; one that is there and has other bytes is mended."""
    sha256 = sha256_hex(data)
    path = blob_path(sha256)
    if not files.create(path, data) and not _holds(files, path, data):
        files.replace(path, data)
    return sha256


def _holds(files: WritableFiles, path: str, data: bytes) -> bool:
    try:
        return files.read(path, len(data)) == data
    except InvalidMetadata:  # it is longer
        return False


def _ref_name(text: str) -> str:
    ref = str(parse_pin(text))
    if is_commit(ref):
        raise InvalidReference(f"{text!r} would be taken for a commit", hint="Expected such as v1 or main.")
    return safe_path(ref)


def time_text(epoch: int) -> str:
    """`2026-11-21T20:00:00Z` for seconds since 1970. Raises `InvalidReference`."""
    try:
        if epoch < 0:
            raise ValueError(epoch)
        return datetime.datetime.fromtimestamp(epoch, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidReference(f"{epoch} is not a time in seconds since 1970") from error
