"""Ten minutes of malformed input for each parser that decides what is written or run: `make fuzz`.

    python tests/fuzz/run.py [--seconds 600] [metadata manifest archive tree ...]

With atheris (`pip install atheris`, Linux) the input follows what the code does with it; without, hypothesis makes it up. An
input that a parser does not read or refuse is kept in `.fuzz/`, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEPT = HERE.parents[1] / ".fuzz"
DEFAULT = ("metadata", "manifest", "archive", "tree")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=DEFAULT)
    parser.add_argument("--seconds", type=int, default=600, help="for each")
    parser.add_argument("--here", action="store_true", help="in this process (what run.py starts for each target)")
    wanted = parser.parse_args()
    if not wanted.here:
        return max(_start(name, wanted.seconds) for name in wanted.targets)
    _fuzz(wanted.targets[0], wanted.seconds)
    return 0


def _start(name: str, seconds: int) -> int:
    """Fuzz one target in a process of its own: 0, or 1 where something was found."""
    started = time.monotonic()
    command = [sys.executable, str(HERE / "run.py"), name, "--seconds", str(seconds), "--here"]
    done = subprocess.run(command, check=False)
    print(
        f"{name}: {'nothing found' if done.returncode == 0 else 'FAILED'}, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return min(done.returncode, 1)


def _fuzz(name: str, seconds: int) -> None:
    sys.path.insert(0, str(HERE))
    if importlib.util.find_spec("atheris") is None:
        _with_hypothesis(name, seconds)
    else:
        _with_atheris(name, seconds)


def _with_atheris(name: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["kernelhub", "targets"]):
        from targets import TARGETS

    corpus = KEPT / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    limits = [f"-max_total_time={seconds}", "-rss_limit_mb=2048", "-timeout=20", "-max_len=4096", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={KEPT}/{name}-", str(corpus)], TARGETS[name].run)
    atheris.Fuzz()


def _with_hypothesis(name: str, seconds: int) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from targets import TARGETS
    from test_fuzz import edited, edits

    target, end, count = TARGETS[name], time.monotonic() + seconds, 0

    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(target.seeds), edits)
    def some(seed: bytes, changes: list[tuple[float, int, bytes]]) -> None:
        nonlocal count
        count += 1
        data = edited(seed, changes)
        try:
            target.run(data)
        except BaseException:
            KEPT.mkdir(exist_ok=True)
            (KEPT / f"{name}-failed").write_bytes(data)
            raise

    while time.monotonic() < end:
        some()
    print(f"{name}: {count:,} inputs")


if __name__ == "__main__":
    raise SystemExit(main())
