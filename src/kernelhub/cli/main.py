"""`kernelhub`: the commands, and what the process ends with."""

from __future__ import annotations

import errno
import signal
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
from kernelhub.errors import KernelHubError, StoreError

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
# Beside each what it is for, in a line of 80 columns: the first sentence of its help would be cut there.
for command, purpose in (
    (demo.demo, "Kernelize three real models, check, time and undo them."),
    (get.get, "Fetch a kernel for this machine."),
    (info.info, "Describe a kernel; none of its code runs."),
    (versions.versions, "List a kernel's versions, branches and tags."),
    (variants.variants, "List a kernel's builds, and which run here."),
    (lock.lock, "Pin a project's kernels in kernels.lock."),
    (download.download, "Fetch what kernels.lock names."),
    (publish.publish, "Publish a kernel into a hub."),
    (keygen.keygen, "Make a signing key."),
    (sign.sign, "Sign a published commit with another key."),
    (revoke.revoke, "Take back commits and keys."),
    (verify.verify, "Show who signed a kernel, and hash its files."),
    (verify_report.verify_report, "Check the kernels that a saved report names."),
    (build.build, "Build a kernel project."),
    (init.init, "Make a new kernel project."),
    (check_abi.check_abi, "Check where a compiled kernel runs."),
    (benchmark.benchmark, "Run a kernel's benchmarks."),
    (doctor.doctor, "Show this machine, and what is in the way of kernels."),
    (serve.serve, "Serve a folder of kernels over HTTP."),
):
    app.command(short_help=purpose)(command)
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
    except OSError as error:
        if error.errno != errno.ENOSPC:  # of the output: the store says so itself, and anything else is a defect
            raise
        show_error(StoreError(f"the output could not be written: {error.strerror}"))
        return StoreError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        show_note(_INTERRUPTED)
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def main() -> None:
    """The console script."""
    for name in ("SIGTERM", "SIGHUP"):  # compilers end with it, and folders that they write to go
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    show_steps()
    show_warnings()
    sys.exit(run())
