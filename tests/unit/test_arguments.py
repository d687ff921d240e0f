"""Arguments of another type are errors that say what was expected, not what Python met on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernelhub import (
    LayerRepository,
    LocalLayerRepository,
    Mode,
    get_kernel,
    get_kernel_variants,
    get_local_kernel,
    has_kernel,
    kernelize,
)
from kernelhub.build.recipe import Recipe
from kernelhub.errors import InvalidMetadata, InvalidReference

LAYER = torch.nn.Linear(1, 1)
WRONG: dict[str, Callable[[Any], object]] = {
    "get_kernel": lambda value: get_kernel(value, version=1),
    "get_kernel, revision": lambda value: get_kernel("org/name", revision=value),
    "has_kernel": lambda value: has_kernel(value, version=1),
    "get_kernel_variants": lambda value: get_kernel_variants(value, version=1),
    "get_local_kernel": get_local_kernel,
    "LayerRepository": lambda value: LayerRepository(value, layer_name="RMSNorm", version=1),
    "LocalLayerRepository": lambda value: LocalLayerRepository(value, layer_name="RMSNorm"),
    "kernelize": lambda value: kernelize(value, mode=Mode.INFERENCE),
    "kernelize, include": lambda value: kernelize(LAYER, mode=Mode.INFERENCE, include=value),
    "kernelize, exclude": lambda value: kernelize(LAYER, mode=Mode.INFERENCE, exclude=value),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_number_is_none_of_these(call: Callable[[Any], object]) -> None:
    with pytest.raises(InvalidReference, match="5|got int"):
        call(5)


def test_a_build_toml_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "build.toml").mkdir()
    with pytest.raises(InvalidMetadata, match=r"build\.toml cannot be read"):
        Recipe.load(tmp_path)
