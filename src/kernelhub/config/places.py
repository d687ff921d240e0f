"""Where a kernel_config.json lies: a folder, a hub of this package's kind, or the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kernelhub.config.document import FILE_NAME, MAX_BYTES
from kernelhub.core.refs import RepoId
from kernelhub.errors import HubUnavailable, InvalidReference, KernelNotFound
from kernelhub.hub.addresses import shown
from kernelhub.hub.files import open_files
from kernelhub.hub.publish import put_file
from kernelhub.hub.telemetry import user_agent
from kernelhub.settings import Settings


def read_folder(folder: Path) -> bytes:
    """The file in a folder. Raises `KernelNotFound` where there is none."""
    try:
        return (folder / FILE_NAME).read_bytes()
    except OSError as error:
        raise KernelNotFound(
            f"{folder} has no {FILE_NAME}: {error.strerror or error}", hint="KernelConfig.save_pretrained writes it."
        ) from error


def write_folder(folder: Path, text: str) -> Path:
    """Write the file into a folder, which is made where it is not there; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def read_hub(hub: str, repo: RepoId, settings: Settings) -> bytes:
    """The file beside the repository's commits in a hub. Raises `KernelNotFound`, `HubUnavailable`."""
    files = open_files(hub, partial(user_agent, enabled=settings.telemetry))
    data = files.read(f"{repo}/{FILE_NAME}", MAX_BYTES)
    if data is None:
        files.check_root()
        raise KernelNotFound(f"{shown(hub)} has no {repo}/{FILE_NAME}", hint="KernelConfig.push_to_hub writes it.")
    return data


def write_hub(hub: str, repo: RepoId, text: str) -> str:
    """Write the file into a hub; where it lies there."""
    return f"{shown(hub).rstrip('/')}/{put_file(hub, repo, FILE_NAME, text.encode())}"


def read_hugging_face(repo: RepoId, revision: str | None, token: str | bool | None, settings: Settings) -> bytes:
    """The file in a repository on the Hugging Face Hub; offline, the one that was downloaded before."""
    if settings.offline:
        return _read_downloaded(repo, revision, settings)
    from huggingface_hub import hf_hub_download

    with _errors(f"reading {FILE_NAME} of {repo}", settings):
        path = hf_hub_download(str(repo), FILE_NAME, revision=revision, token=token, endpoint=settings.hf_endpoint)
    return Path(path).read_bytes()


def _read_downloaded(repo: RepoId, revision: str | None, settings: Settings) -> bytes:
    # hf_hub_download(local_files_only=True) sends a request all the same (huggingface_hub 2.4: GET /api/agent-harnesses).
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(str(repo), FILE_NAME, revision=revision)
    if not isinstance(path, str):
        raise HubUnavailable(
            f"{FILE_NAME} of {repo} was never downloaded, and this is offline",
            hub=settings.hf_endpoint,
            hint="Load it once with a network, or from a folder.",
        )
    return Path(path).read_bytes()


def write_hugging_face(
    repo: RepoId, text: str, message: str, private: bool | None, token: str | bool | None, settings: Settings
) -> str:
    """Upload the file in one commit, into a repository that is made where it is not there; the commit's address."""
    if settings.offline:
        raise HubUnavailable(
            "nothing can be uploaded offline",
            hub=settings.hf_endpoint,
            hint="Unset HF_HUB_OFFLINE and KERNELHUB_OFFLINE.",
        )
    from huggingface_hub import HfApi

    api = HfApi(endpoint=settings.hf_endpoint, token=token)
    with _errors(f"uploading {FILE_NAME} to {repo}", settings):
        api.create_repo(str(repo), private=private, exist_ok=True)
        commit = api.upload_file(
            path_or_fileobj=text.encode(), path_in_repo=FILE_NAME, repo_id=str(repo), commit_message=message
        )
    return str(commit.commit_url)


@contextmanager
def _errors(doing: str, settings: Settings) -> Iterator[None]:
    """What huggingface_hub raises, as this package's errors."""
    from huggingface_hub import errors

    hub = settings.hf_endpoint
    transport = errors.HfHubHTTPError.__bases__  # what its HTTP client raises: a package that its versions differ in
    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise HubUnavailable(f"{doing}: {_first(error)}", hub=hub) from error
        raise KernelNotFound(f"{doing}: {_first(error)}") from error
    except errors.HFValidationError as error:
        raise InvalidReference(f"{doing}: {_first(error)}") from error
    except (OSError, *transport) as error:
        raise HubUnavailable(f"{doing}: {_first(error)}", hub=hub) from error


def _first(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
