"""`kernelhub build`: a kernel project into variants for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kernelhub.cli.options import Json
from kernelhub.cli.render import show_json, show_line, show_note, step_bar
from kernelhub.errors import InvalidReference, context

if TYPE_CHECKING:
    from kernelhub.build.recipe import Recipe


def build(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The project: a folder with a build.toml.")] = Path(),
    variant: Annotated[
        list[str] | None, typer.Option("--variant", metavar="NAME", help="Only this variant; may be repeated.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", metavar="NAME", help="Only this backend; may be repeated.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="How many files to compile at a time.")
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="For every Linux from glibc 2.28 on (CPU kernels; needs ziglang).")
    ] = False,
    update_toml: Annotated[
        bool,
        typer.Option("--update-toml", help="Rewrite an older build.toml in the present edition, and build nothing."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a kernel project's variants into build/<variant>/. What cannot be built here is skipped, with the reason."""
    from kernelhub.build.assemble import Workshop
    from kernelhub.build.project import build_project
    from kernelhub.build.recipe import Recipe
    from kernelhub.build.toolchain import find_toolchain
    from kernelhub.settings import Settings

    if not (folder / "build.toml").exists():
        missing = "has no build.toml" if folder.is_dir() else "is not a folder"
        raise InvalidReference(f"{folder} {missing}", hint="`kernelhub init NAME` makes a project.")
    recipe = Recipe.load(folder)
    if update_toml:
        _update(folder, recipe, as_json)
        return
    for note in recipe.notes:
        show_note(f"{folder / 'build.toml'}: {note} (`kernelhub build --update-toml` writes it)")
    settings = Settings.from_env()
    toolchain = find_toolchain(
        settings.cxx, settings.cuda_home, portable=portable, with_cuda=recipe.compiles_for("cuda")
    )
    with step_bar(recipe.name) as steps:
        workshop = Workshop(toolchain, settings.cache_folder / "build", jobs, steps)
        done = build_project(folder, workshop, variants=variant or (), backends=backend or ())
    if portable:
        _check([item.path for item in done if item.path])
    if as_json:
        show_json({"kernel": recipe.name, "built": [vars(item) for item in done]})
        return
    for item in done:
        if item.path:
            show_line(f"built    {item.path}")
            if item.left_out:
                show_note(f"{item.variant} is not for {', '.join(item.left_out)}: nvcc here does not compile for them")
        else:
            show_line(f"skipped  {item.variant or item.backend}: {item.reason}")


def _update(folder: Path, recipe: Recipe, as_json: bool) -> None:
    from kernelhub.build.recipe import update
    from kernelhub.hub.disk import writing

    path = folder / "build.toml"
    with context(str(path)):
        text = update(path.read_bytes().decode("utf-8-sig"))  # read_text would make other ends of lines
    if recipe.notes:
        with writing(path):
            path.write_bytes(text.encode())
    if as_json:
        show_json({"file": str(path), "changed": list(recipe.notes)})
    for note in recipe.notes if not as_json else ():
        show_line(f"changed  {note}")
    if not recipe.notes and not as_json:
        show_line(f"{path} is in the present edition")


def _check(folders: list[Path]) -> None:
    """What was built to run everywhere does, or it is an error."""
    from kernelhub.build.abi import check
    from kernelhub.errors import BuildFailed

    for folder in folders:
        for report in check(folder) if any(folder.rglob("*.so")) else []:
            if report.problems:
                listed = "".join(f"\n    {problem}" for problem in report.problems)
                raise BuildFailed(f"{report.path} is not portable{listed}", error=report.problems[0])
