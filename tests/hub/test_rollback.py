"""Versions only go forward: what a client believes of a hub that goes back to what it was."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kernelfiles import MemorySource, kernel_files, write_kernel
from layout_fixtures import EPOCH, agent, serving

from kernelhub import Hub, Settings
from kernelhub.core.history import MAX_BEFORE, MAX_STEPS, goes_back, remembered
from kernelhub.core.host import Host
from kernelhub.core.manifest import Manifest
from kernelhub.core.refs import KernelRef, RepoId
from kernelhub.errors import InvalidMetadata, KernelHubWarning
from kernelhub.hub.publish import publish
from kernelhub.hub.sources.layout import LayoutSource
from kernelhub.hub.sources.project import ProjectSource

HOST = Host(python=(3, 11), torch=(2, 13), backend="cpu", cpu="x86_64", os="linux")
REPO = RepoId("org", "small")
SMALL = KernelRef.parse("org/small@v1")


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def client(tmp_path: Path, root: Path, clock: Clock) -> Callable[..., Hub]:
    def make(source: Any = None, **settings: Any) -> Hub:
        made = Settings(cache=tmp_path / "store", build="never", trust=("org/*",), **settings)
        return Hub(made, sources=[source or LayoutSource(str(root), agent)], host=HOST, clock=clock)

    return make


def put(root: Path, value: object, *, epoch: int = EPOCH) -> str:
    folder = root.parent / "kernel"
    shutil.rmtree(folder, ignore_errors=True)
    write_kernel(folder, code=f"VALUE = {value!r}\n")
    return publish(folder, str(root), REPO, epoch=epoch).commit


def point(root: Path, commit: str) -> None:
    (root / "org/small/refs/v1").write_text(f"{commit}\n")


def value_of(hub: Hub, **options: Any) -> object:
    return hub.load(SMALL, **options).module.VALUE


def test_a_version_goes_forward_in_silence_over_any_number_of_commits(client, root) -> None:
    put(root, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_of(client()) == 0
        put(root, 1)
        assert value_of(client()) == 1
        for number in range(2, 6):
            put(root, number)
        assert value_of(client()) == 5


@pytest.mark.parametrize("seen", [True, False])
def test_an_older_commit_is_refused_with_a_warning_that_names_both(client, root, clock, seen) -> None:
    """Whether this client has seen the older one itself or not: the newer one's manifest says what came before it."""
    old = put(root, "old")
    if seen:
        assert value_of(client()) == "old"
    new = put(root, "new")
    assert value_of(client()) == "new"
    point(root, old)
    for hub in (client(), client()):
        with pytest.warns(KernelHubWarning, match=f"(?s)v1 is {old}; it was {new}.*--accept-older"):
            assert value_of(hub) == "new"


@pytest.mark.parametrize("refresh", [True, False])
def test_a_remote_hub_is_not_believed_either_and_asking_again_is_no_consent(client, root, clock, refresh) -> None:
    old, new = put(root, "old"), put(root, "new")
    with serving(root) as web:
        source = LayoutSource(web.url, agent)
        assert value_of(client(source)) == "new"
        point(root, old)
        clock.now += 4000
        with pytest.warns(KernelHubWarning, match=f"it was {new}"):
            assert value_of(client(source), refresh=refresh) == "new"
        # and offline what is remembered is the newer one
        assert value_of(client(source, offline=True)) == "new"


@pytest.mark.parametrize("answers", [[(404, {})], [(403, {})], [(404, {}), (404, {})]])
def test_a_hub_that_withholds_the_older_manifest_at_first_does_not_pass_for_one_without(
    client, root, clock, answers
) -> None:
    old, new = put(root, "old"), put(root, "new")
    with serving(root) as web:
        source = LayoutSource(web.url, agent)
        assert value_of(client(source)) == "new"
        point(root, old)
        clock.now += 4000
        web.answers[f"{old}.json"] = list(answers)
        with pytest.warns(KernelHubWarning, match="as it was known before"):
            assert value_of(client(source)) == "new"
        web.answers.clear()
        with pytest.warns(KernelHubWarning, match=f"it was {new}"):
            assert value_of(client(source)) == "new"


def test_who_accepts_it_gets_the_older_one_and_keeps_it(client, root) -> None:
    old, new = put(root, "old"), put(root, "new")
    assert value_of(client()) == "new"
    point(root, old)
    assert client().install(SMALL, accept_older=True).parent.name == old
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_of(client()) == "old"
        point(root, new)
        assert value_of(client()) == "new"  # forward again


def test_accepting_asks_the_hub_now(client, root, clock) -> None:
    old = put(root, "old")
    put(root, "new")
    with serving(root) as web:
        source = LayoutSource(web.url, agent)
        assert value_of(client(source)) == "new"
        point(root, old)
        assert client(source).install(SMALL, accept_older=True).parent.name == old


def test_a_commit_that_is_named_is_taken_however_old(client, root) -> None:
    old = put(root, "old")
    put(root, "new")
    assert value_of(client()) == "new"
    assert client().load(KernelRef.parse(f"org/small@{old}")).module.VALUE == "old"
    assert value_of(client()) == "new"


def test_a_hub_that_was_made_anew_is_refused_until_it_is_accepted(client, root) -> None:
    """Its commits are newer by their time, but nothing of what was there before is among their parents."""
    put(root, "before")
    assert value_of(client()) == "before"
    shutil.rmtree(root)
    put(root, "after", epoch=EPOCH + 1000)
    with pytest.warns(KernelHubWarning, match="does not come after that"):
        assert value_of(client()) == "before"
    client().install(SMALL, accept_older=True)
    assert value_of(client()) == "after"


def test_where_the_manifests_between_are_gone_the_time_decides(client, root) -> None:
    known = put(root, 0)
    assert value_of(client()) == 0
    between = put(root, 1, epoch=EPOCH + 10)
    put(root, 2, epoch=EPOCH + 20)
    (root / "org/small/commits" / f"{between}.json").unlink()
    assert value_of(client()) == 2
    assert known != between


def test_content_that_comes_back_in_a_new_commit_is_no_step_back(client, root) -> None:
    put(root, "a")
    assert value_of(client()) == "a"
    put(root, "b")
    assert value_of(client()) == "b"
    put(root, "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_of(client()) == "a"


def test_a_hub_without_manifests_does_not_go_back_to_what_was_seen(client, clock) -> None:
    source = MemorySource({"org/small": {"torch-cpu": kernel_files("VALUE = 'old'\n")}})
    old = source.commit("org/small")
    value_of(client(source))
    source.kernels["org/small"]["torch-cpu"] = kernel_files("VALUE = 'new'\n")
    new = source.commit("org/small")
    clock.now += 4000
    assert value_of(client(source)) == "new"
    source.kernels["org/small"]["torch-cpu"] = kernel_files("VALUE = 'old'\n")
    clock.now += 4000
    with pytest.warns(KernelHubWarning, match=f"{old}; it was {new}, and {old[:12]} is what it was before"):
        assert value_of(client(source)) == "new"
    assert client(source).install(SMALL, accept_older=True).parent.name == old


@pytest.mark.parametrize("pin", ["v1", "0" * 40])
def test_no_hub_passes_for_a_folder_that_has_no_commits(client, pin) -> None:
    """Of what lies in a folder of the user's, nothing is remembered that it could go back from."""
    source = MemorySource({"org/small": {"torch-cpu": kernel_files()}}, commit_of={"org/small": "0" * 40})
    with pytest.raises(InvalidMetadata, match="which is no commit"):
        client(source).load(KernelRef.parse(f"org/small@{pin}"))


def test_a_users_own_sources_go_where_they_like(client, tmp_path) -> None:
    tree = tmp_path / "tree"
    text = '[general]\nname = "small"\nversion = 1\nedition = 5\nlicense = "MIT"\nbackends = ["cpu"]\n[torch-noarch]\n'
    (tree / "torch-ext/small").mkdir(parents=True)
    (tree / "build.toml").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (1, 2, 1):
            (tree / "torch-ext/small/__init__.py").write_text(f"VALUE = {value}\n")
            assert value_of(client(ProjectSource.of(tree, REPO))) == value


# The rule


def manifest(parent: str | None, time: str = "2026-01-01T00:00:00Z") -> Manifest:
    return Manifest(REPO, 1, parent, time, {})


def test_the_walk_ends() -> None:
    asked: list[str] = []

    def endless(commit: str) -> Manifest:
        asked.append(commit)
        return manifest(f"{len(asked):040x}", "2026-01-01T00:00:00Z" if commit == "known" else "2025-01-01T00:00:00Z")

    assert "cannot be shown" in (goes_back("known", "new", (), endless) or "")
    assert len(asked) <= MAX_STEPS + 2


@pytest.mark.parametrize(("time", "back"), [("2026-01-02T00:00:00Z", False), ("2026-01-01T00:00:00Z", True)])
def test_without_history_only_a_later_time_is_forward(time: str, back: bool) -> None:
    known = {"known": manifest(None), "new": manifest("gone", time)}
    assert bool(goes_back("known", "new", (), known.get)) is back


def test_what_a_version_was_is_remembered_and_bounded() -> None:
    assert remembered((), None, "a") == ()
    assert remembered((), "a", "a") == ()
    assert remembered(("a",), "b", "c") == ("a", "b")
    assert remembered(("a", "b"), "c", "b") == ("a",)
    long = tuple(map(str, range(MAX_BEFORE)))
    assert remembered(long, "x", "y") == (*long[1:], "x")
