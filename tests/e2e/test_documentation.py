"""The examples of the documentation run as they are printed."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_examples_run(page, tmp_path, monkeypatch):
    from kernelhub.hub.client import set_default_hub

    monkeypatch.setenv("KERNELHUB_CACHE", str(tmp_path / "store"))
    monkeypatch.setenv("KERNELHUB_OFFLINE", "1")
    monkeypatch.setenv("KERNELHUB_BUILD", "never")  # compiling has tests of its own, and takes longer than all examples
    monkeypatch.chdir(tmp_path)
    set_default_hub(None)
    try:
        for code in examples(page):
            exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
    finally:
        set_default_hub(None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_map_of_the_code_names_what_is_there():
    """Every file that it names exists, and every file of more than 250 lines in the packages that it explains is named."""
    package = ROOT / "src" / "kernelhub"
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_/]+\.py)`", text))
    there = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    ends = {end for path in there for end in (path, path.partition("/")[2])}
    assert {name for name in named - ends if not (ROOT / name).is_file()} == set()
    large = {
        path
        for path, file in there.items()
        if path.startswith(("hub/", "layers/")) and len(file.read_text(encoding="utf-8").splitlines()) > 250
    }
    assert {path for path in large if path not in named and path.partition("/")[2] not in named} == set()


def test_every_variable_that_settings_read_is_documented():
    settings = (ROOT / "src/kernelhub/settings.py").read_text(encoding="utf-8")
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = set(re.findall(r'"((?:KERNEL|HF_|DISABLE_|DO_NOT|LOCAL_)[A-Z_]+)"', settings))
    assert len(names) >= 12
    assert {name for name in names if name not in text} == set()


def test_every_folder_of_tests_is_run(pytestconfig):
    """pytest passes folders by that are called as those of builds are."""
    passed_by = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert {
        str(of) for of in folders if any(fnmatch(part, pattern) for part in of.parts for pattern in passed_by)
    } == set()
