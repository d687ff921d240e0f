"""`kernelhub`: the commands, and what the process ends with."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from kernelhub import __version__
from kernelhub.cli import (
    benchmark,
    build,
    bundle,
    cache,
    check_abi,
    demo,
    doctor,
    download,
    get,
    info,
    init,
    keygen,
    lock,
    publish,
    revoke,
    serve,
    sign,
    variants,
    verify,
    verify_report,
    versions,
)
from kernelhub.cli.render import show_error, show_note, show_steps, show_warnings
from kernelhub.errors import KernelHubError

INTERRUPTED = 130
_INTERRUPTED = "interrupted; the store and the hub hold nothing that is half done: run the command again to finish it"

# Wrong use. Typer brings its own click from 0.29 on, and before that took the installed one: this finds either's.
_WrongUse: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="kernelhub",
    help="Swap faster compute kernels into PyTorch models, prove each swap, and undo it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    demo.demo,
    get.get,
    info.info,
    versions.versions,
    variants.variants,
    lock.lock,
    download.download,
    publish.publish,
    keygen.keygen,
    sign.sign,
    revoke.revoke,
    verify.verify,
    verify_report.verify_report,
    build.build,
    init.init,
    check_abi.check_abi,
    benchmark.benchmark,
    doctor.doctor,
    serve.serve,
):
    app.command()(command)
app.add_typer(bundle.app, name="bundle")
app.add_typer(cache.app, name="cache")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kernelhub {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Swap faster compute kernels into PyTorch models, prove each swap, and undo it."""


def run(arguments: list[str] | None = None) -> int:
    """Run a command; what the process should end with: 0 done, 1 no, 2 wrong use, 3 the hub, 4 integrity or trust."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        result = app(arguments, standalone_mode=False)
        if result == INTERRUPTED:  # what typer makes of Ctrl-C; no command returns it
            raise KeyboardInterrupt
    except KernelHubError as error:
        show_error(error, as_json="--json" in arguments)
        return error.exit_code
    except _WrongUse as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        show_note(_INTERRUPTED)
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def main() -> None:
    """The console script."""
    show_steps()
    show_warnings()
    sys.exit(run())
