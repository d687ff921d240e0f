"""Path patterns, beside a matcher that is slow and plain."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kernelhub.layers.plan import Selector

NAMES = st.sampled_from(["a", "ab", "b", "0", "10", "+"])
PATHS = st.lists(NAMES, min_size=1, max_size=5)
PATTERNS = st.lists(
    st.one_of(NAMES, st.sampled_from(["*", "**", "a*", "*b", "*a*", "a**", "**b", "***"])), min_size=1, max_size=5
)


def matches(pattern: list[str], path: list[str]) -> bool:
    """`*` stands for any letters of a segment, `**` for any number of segments; at the end of at least one."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(matches(pattern[1:], path[index:]) for index in range(len(pattern) == 1, len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and matches(pattern[1:], path[1:])


@given(PATTERNS, PATHS)
def test_a_pattern_chooses_what_the_plain_matcher_chooses(pattern: list[str], path: list[str]) -> None:
    module = nn.Module()
    text, where = ".".join(pattern), ".".join(path)
    assert (Selector(text, None).refuses(where, module) is None) == matches(pattern, path)
    assert (Selector(None, [text]).refuses(where, module) is not None) == matches(pattern, path)


@pytest.mark.parametrize(
    ("pattern", "path", "chosen"),
    [
        ("model.layers.*.mlp", "model.layers.3.mlp", True),
        ("model.layers.*.mlp", "model.layers.3.inner.mlp", False),
        ("model.**.mlp", "model.layers.3.mlp", True),
        ("**.mlp", "mlp", True),
        ("model.**", "model", False),
        ("model.**", "model.norm", True),
        ("a.b", "a+b", False),
        ("model.lay**", "model.norm", False),
        ("model.lay**", "model.layers", True),
        ("*", "", False),
    ],
)
def test_patterns_as_they_are_written(pattern: str, path: str, chosen: bool) -> None:
    assert (Selector(pattern, None).refuses(path, nn.Module()) is None) == chosen
