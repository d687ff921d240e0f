from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kernelhub.core.paths import is_bytecode, safe_path
from kernelhub.errors import InvalidMetadata, InvalidReference
from kernelhub.settings import user_path


@pytest.mark.parametrize(
    "path",
    [
        "a",
        "__init__.py",
        "a/b/c.py",
        "a.b/c",
        ".hidden",
        "a b",
        "console.py",
        "nullable/x",
        "com/1",
        "é.py",
        "a" * 255,
        "/".join(["a" * 100] * 10),
    ],
)
def test_a_path_inside_a_kernel_is_given_back(path: str) -> None:
    assert safe_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/..", "a/../b", "./a", "a/./b", "~/..", "a/b/../../../c"),
        *("\\a", "a\\b", "..\\a", "C:", "C:/a", "c:a", "a:b", "a*b", "a?b", 'a"b', "a<b", "a>b", "a|b"),
        *("a\0b", "a\nb", "a\x1f", "a\x7f", "a ", "a.", "a /b", "a./b", "..."),
        *("con", "CON", "nul.txt", "a/aux", "Aux.py", "com1", "com¹.x", "LPT9", "prn.tar.gz", "con .txt", "conin$"),
        *("\ud800", "a/\udfff.py", "a" * 256, "é" * 128, "/".join(["a" * 100] * 11)),
    ],
)
def test_a_path_that_leaves_or_cannot_be_stored_everywhere_is_refused(path: str) -> None:
    with pytest.raises(InvalidMetadata, match="is not a path inside a kernel"):
        safe_path(path)


@pytest.mark.parametrize("path", ["a.pyc", "a/b.PYC", "x.pyo", "__pycache__/a.py", "a/__PyCache__/b", "__pycache__"])
def test_compiled_python_is_bytecode(path: str) -> None:
    assert is_bytecode(path)


@pytest.mark.parametrize("path", ["a.py", "a.pyd", "pyc", "a.pyc.py", "a__pycache__/b.py", "a.so", "pycache/a"])
def test_other_files_are_not(path: str) -> None:
    assert not is_bytecode(path)


@pytest.mark.parametrize("written", [5, None, "~no-such-user-here/kernel"])
def test_what_is_no_path_of_the_users_is_one_error(written: Any) -> None:
    with pytest.raises(InvalidReference, match=r"^here: "):
        user_path(written, "here")


def test_a_path_of_the_users_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert user_path("kernel") == user_path(Path("~/kernel")) == tmp_path / "kernel"
