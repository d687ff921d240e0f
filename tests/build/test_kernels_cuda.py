"""The starter kernels' CUDA sources compile where there is nvcc and no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernelhub.build.assemble import Workshop, make_variant
from kernelhub.build.recipe import Recipe
from kernelhub.build.targets import Skipped, Target, compiled_target
from kernelhub.build.toolchain import Toolchain

KERNELS = Path(__file__).parents[2] / "kernels"


def cuda_target(name: str, toolchain: Toolchain) -> tuple[Recipe, Target]:
    if toolchain.nvcc is None:
        pytest.skip("no nvcc")
    recipe = Recipe.load(KERNELS / name)
    target = compiled_target(recipe, "cuda", toolchain, ["9.0"])
    assert isinstance(target, Target), target
    return recipe, target


@pytest.mark.parametrize("name", ["activation", "decoder", "loss", "norm", "rotary"])
def test_every_cuda_source_is_listed(name: str, toolchain: Toolchain) -> None:
    _, target = cuda_target(name, toolchain)
    listed = {source for section, _ in target.sections for source in section.sources}
    assert listed == {
        str(path.relative_to(KERNELS / name))
        for path in (KERNELS / name / f"{name}_cuda").iterdir()
        if path.suffix in (".cu", ".cpp")
    }


@pytest.mark.slow
def test_cuda_sources_compile_for_one_architecture(toolchain: Toolchain, tmp_path: Path) -> None:
    """The one that compiles fastest; the others share its headers."""
    recipe, target = cuda_target("loss", toolchain)
    files = make_variant(KERNELS / "loss", recipe, target, Workshop(toolchain, tmp_path))
    (library,) = (data for path, data in files.items() if path.endswith(".so"))
    assert b"sm_90" in library


@pytest.mark.slow
def test_what_is_for_one_architecture_alone_compiles_for_it(toolchain: Toolchain, tmp_path: Path) -> None:
    recipe, target = cuda_target("decoder", toolchain)
    assert target.archs == ("9.0a",)
    files = make_variant(KERNELS / "decoder", recipe, target, Workshop(toolchain, tmp_path))
    (library,) = (data for path, data in files.items() if path.endswith(".so"))
    assert b"sm_90a" in library


def test_other_gpus_have_the_noarch_variant(toolchain: Toolchain) -> None:
    cuda_target("decoder", toolchain)
    skipped = compiled_target(Recipe.load(KERNELS / "decoder"), "cuda", toolchain, ["8.0"])
    assert isinstance(skipped, Skipped)
    assert "9.0a" in skipped.reason
