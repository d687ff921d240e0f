"""The library itself beside the `kernels` package, in one run: import, command line, and `get_kernel` in every state.

    python benchmarks/library.py [--json FILE] [--rounds N]

Everything is on this machine: a server on loopback speaks the Hugging Face Hub's protocol to both (it counts the requests),
a static web server and a folder are the other hubs. Each time is taken in a process of its own, ours and theirs in turn;
medians are printed. `.peers` has the `kernels` package (`make bench` puts it there).
"""

from __future__ import annotations

import argparse
import http.server
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".peers"
COMMIT_TIME = 1_700_000_000
PACKAGES = ("kernelhub", "kernels")

# What a measured process runs: it prints one JSON line.
GET = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
begin = time.perf_counter()
from {package} import get_kernel
arguments = dict(version=1, trust_remote_code=True)
start = time.perf_counter()
module = get_kernel({repo!r}, **arguments)
first = time.perf_counter() - start
whole = time.perf_counter() - begin
again = []
for _ in range({again}):
    start = time.perf_counter()
    get_kernel({repo!r}, **arguments)
    again.append(time.perf_counter() - start)
assert module.VALUE == 1
print(json.dumps({{"first": first, "whole": whole, "again": sorted(again)[len(again) // 2] if again else None}}))
"""
IMPORT = """
import json, time
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
before = resident()
start = time.perf_counter()
import {package}
print(json.dumps({{"first": time.perf_counter() - start, "memory": resident() - before}}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=7, help="processes for each figure")
    options = parser.parse_args()
    if not (PEERS / "kernels").is_dir():
        sys.exit(f"{PEERS} does not have the kernels package; run `make bench`")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.rounds)
    show(rows)
    if options.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def measure(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """All rows: what was measured, ours, theirs, the unit, and how many requests each sent."""
    rows = [*library_rows(folder, rounds)]
    for count in (5, 50, 500):
        write_repository(folder / "repositories" / "org" / f"files{count}", count)
    with serving(folder / "repositories") as hub:
        rows += protocol_rows(folder, hub, rounds)
    rows += folder_rows(folder, rounds)
    return rows


def library_rows(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Import, memory and `--help`."""
    found = {"kernelhub": [], "kernels": []}  # type: dict[str, list[dict[str, Any]]]
    for _ in range(rounds):
        for package, runs in found.items():
            runs.append(run(IMPORT.format(package=package), folder / "none", "http://127.0.0.1:9"))
    rows = [
        row("import, over bare Python", "ms", *(1e3 * median(runs, "first") for runs in found.values())),
        row("import, memory", "MB", *(median(runs, "memory") / 1e6 for runs in found.values())),
    ]
    commands = {
        "kernelhub": [sys.executable, "-m", "kernelhub", "--help"],
        "kernels": [sys.executable, str(PEERS / "bin" / "kernels"), "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            times[name].append(
                timed(
                    lambda command=command: subprocess.run(
                        command, env=environment(folder, ""), stdout=subprocess.DEVNULL, check=True
                    )
                )
            )  # type: ignore[misc]
    return [*rows, row("command line, --help", "ms", *(1e3 * statistics.median(values) for values in times.values()))]


def protocol_rows(folder: Path, hub: Server, rounds: int) -> list[dict[str, Any]]:
    """`get_kernel` over the Hugging Face Hub's protocol: cold, warm, again, and eight processes at once."""
    rows = []
    for count in (5, 50, 500):
        runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for index, package in itertools.product(range(rounds), PACKAGES):
            cache = folder / f"{package}-{count}-{index}"
            for state, again in (("cold", 0), ("warm", 0), ("again", 50)):
                hub.count()
                result = run(get(package, f"org/files{count}", again), cache, hub.url)
                runs[state, package].append({**result, "requests": hub.count()})

        def figures(what: str, unit: str, scale: float, state: str, key: str) -> dict[str, Any]:
            values = [scale * median(runs[state, package], key) for package in PACKAGES]  # noqa: B023 - called at once
            sent = {package: [one["requests"] for one in runs[state, package]] for package in PACKAGES}  # noqa: B023
            return row(what, unit, *values, None if state == "again" else sent)

        rows += [
            figures(f"get_kernel cold, {count} files", "ms", 1e3, "cold", "first"),
            figures(f"import and get_kernel cold, {count} files", "ms", 1e3, "cold", "whole"),
            figures(f"get_kernel warm in a new process, {count} files", "ms", 1e3, "warm", "first"),
            figures(f"get_kernel again in one process, {count} files", "us", 1e6, "again", "again"),
        ]
    times: dict[str, list[float]] = defaultdict(list)
    requests: dict[str, list[int]] = defaultdict(list)
    for index, package in itertools.product(range(max(1, rounds // 3)), PACKAGES):
        hub.count()
        times[package].append(eight(package, folder / f"{package}-eight-{index}", hub.url))
        requests[package].append(hub.count())
    slowest = [statistics.median(times[package]) for package in PACKAGES]
    return [*rows, row("8 processes cold, 500 files, the slowest", "s", *slowest, requests)]


def folder_rows(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """`get_kernel` cold from a hub in a folder, and from the same bytes on a static web host; theirs has no such hub."""
    from kernelhub.core.refs import RepoId
    from kernelhub.hub.publish import publish

    hub = folder / "hub"
    for count in (50, 500):
        publish(
            folder / "repositories" / "org" / f"files{count}",
            str(hub),
            RepoId("org", f"files{count}"),
            epoch=COMMIT_TIME,
        )
    rows = []
    with static(hub) as (url, log):
        for (kind, place), count in itertools.product((("in a folder", str(hub)), ("on a web host", url)), (50, 500)):
            runs, requests = [], []
            for index in range(rounds):
                log.clear()
                cache = folder / f"layout-{kind[-4:]}-{count}-{index}"
                code = get("kernelhub", f"org/files{count}", 0)
                runs.append(run(code, cache, "http://127.0.0.1:9", KERNELHUB_HUBS=place))
                requests.append(len(log))
            counted = {"kernelhub": requests} if place == url else None
            rows.append(
                row(f"get_kernel cold, {count} files, hub {kind}", "ms", 1e3 * median(runs, "first"), None, counted)
            )
    return rows


# The parts


def row(
    what: str, unit: str, ours: float, theirs: float | None, requests: dict[str, list[int]] | None = None
) -> dict[str, Any]:
    counts = {name: int(statistics.median(values)) for name, values in (requests or {}).items()}
    return {"what": what, "unit": unit, "kernelhub": ours, "kernels": theirs, "requests": counts}


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':52} {'kernelhub':>12} {'kernels':>12} {'ratio':>8}   requests")
    for item in rows:
        theirs = f"{item['kernels']:9.2f} {item['unit']:2}" if item["kernels"] is not None else "-"
        ratio = f"{item['kernels'] / item['kernelhub']:.1f}x" if item["kernels"] else ""
        requests = " / ".join(str(count) for count in item["requests"].values())
        print(f"{item['what']:52} {item['kernelhub']:9.2f} {item['unit']:2} {theirs:>12} {ratio:>8}   {requests}")


def get(package: str, repo: str, again: int) -> str:
    return GET.format(package=package, repo=repo, again=again)


def median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def timed(job: Callable[[], Any]) -> float:
    import time

    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def environment(cache: Path, endpoint: str, **more: str) -> dict[str, str]:
    """Both packages with their own caches below `cache`, talking to `endpoint` and to nothing else."""
    own = ("PYTHONDONTWRITEBYTECODE", "KERNEL", "HF_")  # as installed, and not set up otherwise by whoever runs this
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return {
        **inherited,
        "PYTHONPATH": str(PEERS),
        "HF_HOME": str(cache / "hf"),
        "HF_ENDPOINT": endpoint,
        "KERNELHUB_CACHE": str(cache / "kernelhub"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **more,
    }


def run(code: str, cache: Path, endpoint: str, **more: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(cache, endpoint, **more),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"a measured process failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def eight(package: str, cache: Path, endpoint: str) -> float:
    """The slowest of eight processes that load the same kernel into one empty cache; each waits for the others first."""
    gate = f"import sys, torch; from {package} import get_kernel; print('ready', flush=True); sys.stdin.readline()\n"
    code = gate + get(package, "org/files500", 0)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment(cache, endpoint),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return max(json.loads(process.communicate()[0].splitlines()[-1])["first"] for process in processes)


def write_repository(repository: Path, count: int) -> None:
    """A kernel of `count` files: 4 KB of Python each, all but one never imported."""
    sys.path.insert(0, str(ROOT / "tests"))
    from kernelfiles import write_kernel

    code = {f"part{index}.py": f"# {'x' * 4000}\nVALUE = {index}\n" for index in range(count - 2)}
    write_kernel(repository, "torch-cpu", code={"__init__.py": "VALUE = 1\n", **code}, name="files")


class Server:
    """The hub under test, in a process of its own, and the requests that it answered."""

    def __init__(self, url: str) -> None:
        self.url = url

    def count(self) -> int:
        """The requests since it was last asked."""
        from urllib.request import urlopen

        with urlopen(f"{self.url}/requests") as answer:
            return int(answer.read())


@contextmanager
def serving(folder: Path) -> Any:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "counting_server.py"), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield Server(process.stdout.readline().strip())
    finally:
        process.terminate()
        process.wait()


@contextmanager
def static(folder: Path) -> Any:
    """A static web server over a folder, and the paths that it was asked for."""
    log: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            log.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main()
