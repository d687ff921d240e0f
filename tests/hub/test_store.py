"""The store: atomic, shared by processes, and an error rather than a half-written folder."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import threading
from pathlib import Path

import pytest
from kernelfiles import kernel_files, write_files

from kernelhub.core.refs import RepoId
from kernelhub.core.variants import BuildVariant
from kernelhub.errors import IntegrityError, StoreError
from kernelhub.hub import verify as verify_module
from kernelhub.hub.store import Place, RefRecord, Store
from kernelhub.hub.store_files import remove_tree

PLACE = Place("hub", RepoId("org", "small"), "a" * 40, BuildVariant.parse("torch-cpu"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def write(folder: Path) -> None:
    write_files(folder, kernel_files())


def visible(store: Store) -> list[str]:
    """What a reader could find in place of a variant."""
    return [path.name for path in store.path(PLACE).parent.glob("*") if path.suffix != ".json"]


def test_a_variant_appears_whole_and_read_only(store):
    verified = store.add(PLACE, write)
    assert verified.path == store.root / "kernels/hub/org--small" / ("a" * 40) / "torch-cpu"
    assert store.find(PLACE) == verified
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (verified.path, *verified.path.rglob("*"))]
    assert not any(mode & 0o222 for mode in modes)
    assert visible(store) == ["torch-cpu"]


def test_writing_twice_writes_once(store):
    store.add(PLACE, write)
    store.add(PLACE, lambda folder: pytest.fail("written again"))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "no")]
)
def test_a_disk_that_cannot_be_written_is_an_error_that_leaves_nothing(store, error):
    def fail(folder: Path) -> None:
        write(folder)
        raise error

    with pytest.raises(StoreError, match="cannot write to the store") as caught:
        store.add(PLACE, fail)
    assert isinstance(caught.value, OSError)
    assert visible(store) == []
    assert store.find(PLACE) is None
    store.add(PLACE, write)


def test_what_does_not_verify_never_appears(store):
    def wrong(folder: Path) -> None:
        write(folder)
        (folder / "__init__.py").write_text("other")

    with pytest.raises(IntegrityError):
        store.add(PLACE, wrong)
    assert visible(store) == []
    assert not list(store.root.rglob("*.tmp"))


def test_an_interrupt_leaves_nothing(store):
    def interrupted(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add(PLACE, interrupted)
    assert not list(store.root.rglob("*.tmp"))


def test_a_store_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="KERNELHUB_CACHE"):
        Store(tmp_path / "file" / "store").add(PLACE, write)


def test_a_read_only_store_serves_what_it_has(store):
    store.add(PLACE, write)
    for folder in [store.root, *store.root.rglob("*/")]:
        folder.chmod(0o555)
    try:
        assert store.find(PLACE)
        store.set_ref("hub", PLACE.repo, "v1", RefRecord("a" * 40, 1.0))  # nothing to say: the hub is asked again
    finally:
        for folder in [store.root, *store.root.rglob("*/")]:
            folder.chmod(0o755)


def _add(root: Path, count: Path, start: object) -> None:
    def write_and_count(folder: Path) -> None:
        with count.open("a") as file:
            file.write("x")
        write(folder)

    start.wait()  # type: ignore[attr-defined]
    Store(root).add(PLACE, write_and_count)


def test_processes_that_want_the_same_write_it_once(store, tmp_path):
    """needs 24: races in caches"""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    workers = [context.Process(target=_add, args=(store.root, tmp_path / "count", start)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "count").read_text() == "x"


def _die_while_writing(root: Path) -> None:
    def die(folder: Path) -> None:
        write(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    Store(root).add(PLACE, die)


def test_a_killed_process_leaves_what_prune_removes_and_no_lock(store):
    worker = multiprocessing.get_context("fork").Process(target=_die_while_writing, args=(store.root,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert store.find(PLACE) is None
    store.add(PLACE, write)
    removed = [path for path, _ in store.prune(lambda repo: False)]
    assert [path.suffix for path in removed] == [".tmp"]
    assert store.find(PLACE)


def _prune(root: Path) -> None:
    list(Store(root).prune(lambda repo: False))


def test_prune_leaves_what_another_process_is_writing(store):
    def write_slowly(folder: Path) -> None:
        write(folder)
        other = multiprocessing.get_context("fork").Process(target=_prune, args=(store.root,))
        other.start()
        other.join(60)
        assert other.exitcode == 0

    assert store.add(PLACE, write_slowly).path.is_dir()


def test_a_small_file_is_written_though_somebody_prunes_it_meanwhile(store, monkeypatch):
    replaced, pruned = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        if not pruned:
            pruned.extend(store.prune(lambda repo: False))
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    store.set_checked("hub", 5.0)
    assert len(pruned) == 1
    assert store.checked("hub") == 5.0


def test_prune_removes_what_is_selected(store):
    other = Place("hub", RepoId("org", "other"), "b" * 40, PLACE.variant)
    store.add(PLACE, write)
    store.add(other, write)
    ((removed, freed),) = store.prune(lambda repo: repo.name == "other")
    assert removed.parent == store.path(other).parent
    assert freed > 100
    assert list(store.places()) == [PLACE]


@pytest.mark.parametrize("leads_to", ["itself", "nothing", "a device"])
def test_a_link_that_leads_to_no_file_is_an_alteration(store, leads_to):
    path = store.add(PLACE, write).path / "__init__.py"
    path.parent.chmod(0o755)
    path.unlink()
    path.symlink_to({"itself": path, "nothing": path.with_name("none"), "a device": "/dev/zero"}[leads_to])
    with pytest.raises(IntegrityError, match="neither a file nor a folder"):
        store.find(PLACE)
    ((place, error),) = store.verify_all()
    assert (place, type(error)) == (PLACE, IntegrityError)


def test_what_cannot_be_read_says_so(store, monkeypatch):
    store.add(PLACE, write)

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(verify_module, "_read", refuse)
    with pytest.raises(StoreError, match="cannot read .*torch-cpu: Permission denied"):
        store.find(PLACE)


def test_a_store_with_a_file_in_place_of_a_folder_does_without_what_would_lie_there(store):
    (store.root / "kernels" / "hub").mkdir(parents=True)
    (store.root / "kernels" / "hub" / "org--small").write_text("")
    store.set_listing("hub", PLACE.repo, PLACE.commit, {"variants": {}})
    store.set_ref("hub", PLACE.repo, "v1", RefRecord(PLACE.commit, 1.0))
    assert store.listing("hub", PLACE.repo, PLACE.commit) == {}
    with pytest.raises(StoreError, match="cannot write to the store"):
        store.add(PLACE, write)


def test_prune_removes_nothing_that_links_in_the_store_lead_to(store, tmp_path):
    """Whoever can write to a shared store could have the files of whoever tidies it up removed."""
    mine = [tmp_path / "home" / name for name in (".ssh/id", "work/.profile", "letter", f"{'a' * 40}/work/file")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    for link in ("kernels/hub/org--small", "kernels/other", "verdicts/x", "revocations"):
        (store.root / link).parent.mkdir(parents=True, exist_ok=True)
        (store.root / link).symlink_to(tmp_path / "home")
    (store.root / "kernels/hub/.left").symlink_to(tmp_path / "home")
    left = [removed.name for removed, _ in [*store.prune(lambda _: True), *store.prune_verdicts(lambda _: True)]]
    assert left == [".left"]
    assert all(path.read_text() == "mine" for path in mine)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_the_store_is_not_waited_for(store):
    """It counts as not written, as whatever else cannot be read does."""
    store.set_listing("hub", PLACE.repo, PLACE.commit, {"variants": {}})
    path = store.path(PLACE).with_name("listing.json")
    path.unlink()
    os.mkfifo(path)
    found: list[object] = []
    reading = threading.Thread(target=lambda: found.append(store.listing("hub", PLACE.repo, PLACE.commit)), daemon=True)
    reading.start()
    reading.join(30)
    assert found == [{}]


def test_verify_all_hashes_every_byte_and_names_what_is_wrong(store, monkeypatch):
    store.add(PLACE, write)
    assert [error for _, error in store.verify_all()] == [None]
    init = store.path(PLACE) / "__init__.py"
    init.chmod(0o644)
    init.write_text("other")
    ((place, error),) = store.verify_all()
    assert place == PLACE
    assert "different: __init__.py" in str(error)


def large(folder: Path) -> None:
    write_files(folder, kernel_files(code={"__init__.py": "", "big.bin": "x" * verify_module.LARGE}))


def test_a_large_file_that_was_not_written_since_is_not_hashed_again(store, monkeypatch):
    store.add(PLACE, large)
    hashed: list[str] = []
    real = verify_module._hash
    monkeypatch.setattr(verify_module, "_hash", lambda path, name: hashed.append(path.name) or real(path, name))
    store.find(PLACE)
    assert hashed == ["__init__.py"]
    hashed.clear()
    Store(store.root, verify_always=True).find(PLACE)
    assert sorted(hashed) == ["__init__.py", "big.bin"]


def test_a_large_file_that_was_written_is_hashed_also_where_its_mtime_says_otherwise(store):
    store.add(PLACE, large)
    big = store.path(PLACE) / "big.bin"
    before = big.stat()
    big.chmod(0o644)
    with big.open("r+b") as file:
        file.write(b"y")
    os.utime(big, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(IntegrityError, match=r"different: big.bin"):
        store.find(PLACE)


def test_refs_are_remembered_with_odd_names(store):
    record = RefRecord("c" * 40, 12.5)
    store.set_ref("hub", PLACE.repo, "feature/x", record)
    assert store.ref("hub", PLACE.repo, "feature/x") == record
    assert [item[2:] for item in store.refs()] == [("feature/x", record)]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"commit": "../x", "time": 1}', '{"commit": null, "time": "x"}'])
def test_a_damaged_record_counts_as_none(store, text):
    store.set_ref("hub", PLACE.repo, "v1", RefRecord("c" * 40, 1.0))
    (store.root / "kernels/hub/org--small/refs/v1").write_text(text)
    assert store.ref("hub", PLACE.repo, "v1") is None


def test_remove_tree_removes_read_only_folders_and_links_not_their_targets(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "keep").write_text("x")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(target, target_is_directory=True)
    tree.chmod(0o555)
    remove_tree(tree)
    assert not tree.exists()
    assert (target / "keep").exists()


def test_a_ref_with_a_name_too_long_for_a_file_is_remembered(store):
    record = RefRecord("c" * 40, 1.0)
    store.set_ref("hub", PLACE.repo, "a/" * 90 + "b", record)
    assert store.ref("hub", PLACE.repo, "a/" * 90 + "b") == record


@pytest.mark.parametrize("text", ['{"files": {}, "stamps": {"a": 5}}', '{"files": [], "stamps": {}}', "{"])
def test_a_damaged_record_of_a_variant_is_an_integrity_error(store, text):
    store.add(PLACE, write)
    (store.path(PLACE).parent / "torch-cpu.json").write_text(text)
    with pytest.raises(IntegrityError, match="no record of what was fetched"):
        store.find(PLACE)


def test_what_is_not_ours_in_the_store_is_passed_over(store):
    store.add(PLACE, write)
    (store.root / "kernels/hub/a b--c/refs").mkdir(parents=True)
    (store.root / "kernels/hub/a b--c/refs/v1").write_text("{}")
    store.set_ref("hub", PLACE.repo, "v1", RefRecord("a" * 40, 1.0))
    assert [item[2] for item in store.refs()] == ["v1"]
    assert list(store.places()) == [PLACE]
