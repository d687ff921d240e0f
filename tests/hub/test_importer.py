"""Kernels as modules: under names of their own, from source alone, side by side, and nothing half imported."""

from __future__ import annotations

import importlib
import importlib.resources
import json
import py_compile
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from kernelfiles import kernel_files, write_files

from kernelhub.core.refs import RepoId
from kernelhub.errors import IntegrityError, InvalidMetadata, KernelImportError, MissingDependency
from kernelhub.hub.importer import Importer
from kernelhub.hub.verify import verify


def load(folder: Path, importer: Importer | None = None, **kernel: object):
    write_files(folder, kernel_files(**kernel))
    return (importer or Importer()).load(verify(folder), None, None, {}).module


def test_a_kernel_has_a_private_name_and_is_in_sys_modules(tmp_path):
    module = load(tmp_path / "a", code="class Layer:\n    pass\n", id="json")
    assert module.__name__.startswith("_kernelhub_json_")
    assert sys.modules[module.Layer.__module__] is module
    assert sys.modules["json"] is json


def test_versions_live_side_by_side_also_with_one_id(tmp_path):
    first = load(tmp_path / "a", code={"__init__.py": "from .sub import V\n", "sub.py": "V = 1\n"}, id="same")
    second = load(tmp_path / "b", code={"__init__.py": "from .sub import V\n", "sub.py": "V = 2\n"}, id="same")
    assert (first.V, second.V) == (1, 2)


def test_the_same_content_from_two_places_is_one_module(tmp_path):
    importer = Importer()
    assert load(tmp_path / "a", importer) is load(tmp_path / "b", importer)


def test_relative_lazy_and_nested_imports_work(tmp_path):
    code = {
        "__init__.py": "from . import inner\nfrom .inner.deep import D\ndef late():\n    from .lazy import L\n    return L\n",
        "inner/__init__.py": "from ..other import O\n",
        "inner/deep.py": "D = 4\n",
        "other.py": "O = 5\n",
        "lazy.py": "L = 6\n",
        "space/part.py": "P = 7\n",
    }
    module = load(tmp_path / "a", code=code)
    assert (module.D, module.inner.O, module.late()) == (4, 5, 6)
    assert importlib.import_module(f"{module.__name__}.space.part").P == 7


def test_nothing_is_written_and_planted_bytecode_is_not_read(tmp_path):
    """The interpreter's own loader would take the planted file: it is as new as the source says."""
    folder = tmp_path / "a"
    code = {"__init__.py": "def late():\n    from .lazy import V\n    return V\n", "lazy.py": "V = 1\n"}
    module = load(folder, code=code)
    before = sorted(folder.rglob("*"))
    source = folder / "lazy.py"
    evil = tmp_path / "evil.py"
    evil.write_text("V = 2\n")
    cache = Path(importlib.util.cache_from_source(str(source)))
    assert not cache.exists()
    cache.parent.mkdir()
    py_compile.compile(str(evil), cfile=str(cache), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert module.late() == 1
    cache.unlink()
    cache.parent.rmdir()
    assert sorted(folder.rglob("*")) == before


def test_a_source_changed_after_verification_is_refused_when_it_is_compiled(tmp_path):
    code = {"__init__.py": "def late():\n    from . import lazy\n", "lazy.py": "V = 1\n"}
    module = load(tmp_path / "a", code=code)
    (tmp_path / "a" / "lazy.py").write_text("V = 2\n")
    with pytest.raises(IntegrityError, match="was changed after the kernel was verified"):
        module.late()


def test_a_file_that_appeared_after_verification_is_not_imported(tmp_path):
    module = load(tmp_path / "a", code="def late():\n    from . import new\n")
    (tmp_path / "a" / "new.py").write_text("V = 2\n")
    with pytest.raises(IntegrityError):
        module.late()


def test_a_failed_import_leaves_no_module_and_can_be_repeated(tmp_path):
    code = {"__init__.py": "from . import ok\nraise RuntimeError('no')\n", "ok.py": ""}
    before = set(sys.modules)
    for _ in range(2):
        with pytest.raises(KernelImportError, match="small: its code raised RuntimeError: no"):
            load(tmp_path / "a", code=code)
        assert not [name for name in set(sys.modules) - before if name.startswith("_kernelhub_")]


def test_a_package_that_its_code_imports_and_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingDependency, match="imports no_such_package, which is not installed"):
        load(tmp_path / "a", code="import no_such_package.sub\n")


def test_older_builds_have_their_code_in_a_folder_of_the_kernels_name(tmp_path):
    code = {"small_kernel/__init__.py": "from .part import V\n", "small_kernel/part.py": "V = 3\n"}
    assert load(tmp_path / "a", code=code, name="small-kernel", id="small_kernel").V == 3


def test_a_variant_without_code_is_an_error(tmp_path):
    with pytest.raises(InvalidMetadata, match=r"has no __init__.py"):
        load(tmp_path / "a", code={"other.py": ""})


def test_resources_and_reload_work(tmp_path):
    module = load(tmp_path / "a", code={"__init__.py": "V = 1\n", "data.txt": "hello"})
    assert importlib.resources.files(module).joinpath("data.txt").read_text() == "hello"
    assert importlib.reload(module) is module


def test_two_compiled_builds_with_one_id_are_refused_before_the_second_is_opened(tmp_path):
    """Their ops would both be torch.ops.<id>."""
    importer = Importer()
    load(tmp_path / "a", importer, code={"__init__.py": "V = 1\n", "_x.abi3.so": "first"}, id="taken")
    with pytest.raises(IntegrityError, match="another build with the id 'taken' is loaded"):
        load(tmp_path / "b", importer, code={"__init__.py": "V = 2\n", "_x.abi3.so": "second"}, id="taken")


def test_with_other_builds_of_what_it_depends_on_it_is_another_module(tmp_path):
    """It keeps what it was loaded with, and `depends` has to say what that is."""
    importer, repo = Importer(), RepoId("org", "dep")
    needs = [{"repo-id": "org/dep", "version": 1}]
    dependencies = [load(tmp_path / name, importer, code=f"V = {name!r}\n", name="dep") for name in ("one", "two")]
    code = "import kernelhub\nV = kernelhub.get_kernel_dep('org/dep').V\n"
    write_files(tmp_path / "top", kernel_files(code, name="top", kernel_depends=needs))
    verified = verify(tmp_path / "top")
    first, second = (importer.load(verified, None, None, {repo: module}, (module.V,)) for module in dependencies)
    assert [first.module.V, second.module.V] == ["one", "two"]
    assert first.module is not second.module
    assert importer.load(verified, None, None, {repo: dependencies[0]}, ("one",)).module is first.module


def test_compiled_code_is_not_loaded_twice_for_other_dependencies(tmp_path):
    importer, repo = Importer(), RepoId("org", "dep")
    needs = [{"repo-id": "org/dep", "version": 1}]
    dependencies = [load(tmp_path / name, importer, code=f"V = {name!r}\n", name="dep") for name in ("one", "two")]
    files = kernel_files({"__init__.py": "V = 1\n", "_x.abi3.so": "first"}, name="top", kernel_depends=needs)
    verified = verify(write_files(tmp_path / "top", files))
    importer.load(verified, None, None, {repo: dependencies[0]})
    with pytest.raises(IntegrityError, match="top is loaded in this process with other builds"):
        importer.load(verified, None, None, {repo: dependencies[1]})


def test_threads_that_load_at_once_get_one_module(tmp_path):
    write_files(tmp_path / "a", kernel_files(code="import threading\nCOUNT = []\n"))
    importer, verified = Importer(), verify(tmp_path / "a")
    start, found = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        found.append(importer.load(verified, None, None, {}).module)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(module) for module in found}) == 1


def test_the_compatibility_package_serves_clients_that_look_for_the_name(tmp_path):
    """Older clients put the variant's folder on sys.path and import the kernel's name."""
    from kernelhub.build.assemble import assemble
    from kernelhub.build.recipe import Recipe

    write_files(
        tmp_path / "tree",
        {
            "build.toml": b'[general]\nname = "two-words"\nversion = 1\nlicense = "MIT"\nbackends = ["cpu"]\n[torch-noarch]\n',
            "torch-ext/two_words/__init__.py": b"from .part import V\n",
            "torch-ext/two_words/part.py": b"V = 9\n",
        },
    )
    recipe = Recipe.load(tmp_path / "tree")
    folder = write_files(tmp_path / "variant", assemble(tmp_path / "tree", recipe, "cpu"))
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import two_words; print(two_words.V)"
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "9"


def test_bytecode_that_appears_later_is_not_run(tmp_path):
    """Python's own finders must not be asked: they would read it."""
    module = load(tmp_path / "a", code="def late():\n    from . import late_part\n")
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    py_compile.compile(str(evil), cfile=str(tmp_path / "a" / "late_part.pyc"))
    with pytest.raises(ImportError):
        module.late()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("known", [True, False])
def test_machine_code_that_was_changed_or_added_later_is_not_opened(tmp_path, known):
    code = {"__init__.py": "def late():\n    from . import sub\n", "sub.py": "V = 1\n"}
    if known:
        code["sub.abi3.so"] = "first"
    module = load(tmp_path / "a", code=code)
    (tmp_path / "a" / "sub.abi3.so").write_bytes(b"planted")
    with pytest.raises(IntegrityError, match="changed after the kernel was verified"):
        module.late()
