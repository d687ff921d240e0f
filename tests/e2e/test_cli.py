"""The command line, as a user types it: what it prints, and what it ends with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from kernelfiles import kernel_files, write_files, write_kernel

from kernelhub.cli.main import run
from kernelhub.cli.render import show_table

COMMANDS = [
    *("get", "info", "versions", "variants", "lock", "download", "publish", "doctor", "serve", "cache", "bundle"),
    "verify-report",
]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of its own, and no network."""
    for name in [name for name in os.environ if name.startswith(("KERNEL", "HF_", "LOCAL_KERNELS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KERNELHUB_CACHE", str(tmp_path / "store"))
    monkeypatch.setenv("KERNELHUB_OFFLINE", "1")


@pytest.fixture
def kernelhub(capsys: pytest.CaptureFixture[str]):
    """Run a command; its exit code, standard output and standard error."""

    def kernelhub(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return kernelhub


@pytest.fixture
def hub(tmp_path: Path, kernelhub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub in a folder with org/small@v1, named by the environment."""
    folder = tmp_path / "hub ü"
    code, out, err = kernelhub("publish", write_kernel(tmp_path / "small"), folder, "--repo-id", "org/small")
    assert (code, err) == (0, ""), err
    assert "published org/small@v1 as " in out
    monkeypatch.setenv("KERNELHUB_HUBS", str(folder))
    return folder


def test_help_lists_every_command(kernelhub):
    code, out, _ = kernelhub("--help")
    assert code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in out


@pytest.mark.parametrize("command", [*COMMANDS, "cache list", "cache verify", "cache prune"])
def test_every_command_explains_itself(kernelhub, command):
    code, out, _ = kernelhub(*command.split(), "--help")
    assert code == 0
    assert "Usage:" in out


@pytest.mark.parametrize("group", [(), ("bundle",), ("cache",)])
def test_the_list_of_commands_cuts_no_sentence_at_80_columns(kernelhub, monkeypatch, group):
    monkeypatch.setenv("COLUMNS", "80")
    out = kernelhub(*group, "--help")[1]
    listed = out.partition("Commands:")[2].splitlines()[1:]
    assert len(listed) >= 3
    assert all(line.endswith(".") and not line.endswith("...") for line in listed if line), out


@pytest.mark.parametrize("command", ["lock", "download", "build", "benchmark", "cache prune", "bundle create"])
def test_what_may_be_left_out_is_bracketed_once(kernelhub, command):
    assert "[[" not in kernelhub(*command.split(), "--help")[1]


def test_the_version_is_the_packages(kernelhub):
    from kernelhub import __version__

    assert kernelhub("--version")[:2] == (0, f"kernelhub {__version__}\n")


def test_a_kernel_goes_from_a_folder_through_a_hub_to_the_store(kernelhub, hub, tmp_path):
    code, out, _ = kernelhub("get", "org/small@v1")
    path = Path(out.strip())
    assert code == 0
    assert path.is_relative_to(tmp_path / "store")
    assert (path / "__init__.py").is_file()
    code, out, _ = kernelhub("get", "org/small@v1", "--json")
    assert json.loads(out) == {"kernel": "org/small@v1", "variant": "torch-cpu", "path": str(path)}


def test_publishing_the_same_again_says_so(kernelhub, hub, tmp_path):
    code, out, _ = kernelhub("publish", tmp_path / "small", hub, "--repo-id", "org/small")
    assert code == 0
    assert "is this already" in out
    _, out, _ = kernelhub("publish", tmp_path / "small", hub, "--repo-id", "org/small", "--json")
    assert json.loads(out)["changed"] is False


def test_versions_names_the_hub_and_the_commits(kernelhub, hub):
    code, out, _ = kernelhub("versions", "org/small", "--json")
    value = json.loads(out)
    assert (code, value["hub"], list(value["refs"])) == (0, str(hub), ["v1"])
    assert value["refs"]["v1"] in kernelhub("versions", "org/small")[1]


def test_variants_gives_the_reason_for_each_rejected_one(kernelhub, hub, tmp_path):
    write_files(tmp_path / "small" / "build" / "torch-cuda", kernel_files(backend={"type": "cuda"}))
    assert kernelhub("publish", tmp_path / "small", hub, "--repo-id", "org/small")[0] == 0
    code, out, _ = kernelhub("variants", "org/small@v1")
    assert code == 0
    assert "yes, and chosen" in out
    assert "made for CUDA, wanted is the CPU" in out


def test_variants_ends_with_1_where_none_runs(kernelhub, tmp_path, monkeypatch):
    write_kernel(tmp_path / "k", "torch-cuda")
    monkeypatch.setenv("LOCAL_KERNELS", f"org/k={tmp_path / 'k'}")
    code, out, _ = kernelhub("variants", "org/k@v1", "--json")
    assert code == 1
    assert json.loads(out)["variants"][0]["runs_here"] is False


def test_info_says_what_would_run_and_why_it_may(kernelhub, hub):
    code, out, _ = kernelhub("info", "org/small@v1", "--json")
    value = json.loads(out)
    assert code == 0
    assert (value["variant"], value["license"]) == ("torch-cpu", "Apache-2.0")
    assert value["digest"].startswith("sha256-")
    assert "which the user named" in value["trusted"]
    assert kernelhub("info", "kernelhub/norm@v1")[0] == 0


def test_the_store_is_listed_verified_and_pruned(kernelhub, hub):
    path = Path(kernelhub("get", "org/small@v1")[1].strip())
    (listed,) = json.loads(kernelhub("cache", "list", "--json")[1])["kernels"]
    assert (listed["kernel"], listed["ref"], listed["variant"]) == ("org/small", "v1", "torch-cpu")
    assert kernelhub("cache", "verify")[0] == 0
    (path / "__init__.py").chmod(0o644)
    (path / "__init__.py").write_text("changed\n")
    code, out, _ = kernelhub("cache", "verify")
    assert code == 4
    assert "different: __init__.py" in out
    assert kernelhub("cache", "prune", "org/small")[0] == 0
    assert json.loads(kernelhub("cache", "list", "--json")[1])["kernels"] == []


def test_doctor_shows_the_machine_and_the_hubs(kernelhub, hub):
    code, out, _ = kernelhub("doctor", "--json")
    facts = {(item["topic"], item["name"]): item for item in json.loads(out)}
    assert code == 0
    assert facts["hubs", str(hub)]["ok"] is True
    assert facts["hubs", "https://huggingface.co"]["value"] == "not asked: offline"
    assert "torch 2." in facts["machine", "selection sees"]["value"]
    assert facts["store", "writable"]["ok"] is True


def test_doctor_fits_a_terminal_and_loses_nothing(kernelhub, tmp_path, monkeypatch):
    """230 columns for one hub in the way."""
    monkeypatch.setenv("KERNELHUB_HUBS", f"relative/hub,{tmp_path.joinpath(*['a-folder' * 4] * 4)}")
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        found = json.loads(kernelhub("doctor", "--json")[1])
        out = kernelhub("doctor")[1]
        for line in out.splitlines():  # what is one word, such as a path, stays one: somebody may copy it
            assert len(line) <= columns or len(line.split()) <= 2, line
        words = " ".join(out.split())
        for item in found:
            assert item["name"] in words
            assert item["name"] == "free" or " ".join(item["value"].split()) in words, item
        assert [line for line in out.splitlines() if not line.startswith(" ")] == [
            "machine", "compilers", "hubs", "store",
        ]  # fmt: skip


def test_doctor_names_variables_that_nobody_reads(kernelhub, hub, monkeypatch):
    monkeypatch.setenv("KERNELHUB_CACHE_DIR", "/tmp")
    monkeypatch.setenv("KERNELHUB_ZZZZZZZZ", "1")
    monkeypatch.setenv("KERNELS_CACHE", os.environ["KERNELHUB_CACHE"])
    code, out, _ = kernelhub("doctor", "--json")
    found = {item["name"]: item["value"] for item in json.loads(out) if item["topic"] == "variables"}
    assert found == {
        "KERNELHUB_CACHE_DIR": "is no setting; is KERNELHUB_CACHE meant?",
        "KERNELHUB_ZZZZZZZZ": "is no setting",
    }
    assert code == 0, "it is in nobody's way"


@pytest.mark.parametrize(
    ("cxx", "ok", "says"), [("/nowhere/g++", False, "CXX is '/nowhere/g++'"), ("g++", True, "g++")]
)
def test_doctor_says_whether_the_users_compiler_runs(kernelhub, hub, monkeypatch, cxx, ok, says):
    monkeypatch.setenv("CXX", cxx)
    code, out, _ = kernelhub("doctor", "--json")
    (found,) = (item for item in json.loads(out) if item["name"] == "CXX")
    assert (found["topic"], found["ok"], says in found["value"]) == ("compilers", ok, True)
    assert code == (0 if ok else 1)


def test_doctor_ends_with_1_where_a_hub_is_in_the_way(kernelhub, tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELHUB_HUBS", str(tmp_path / "nowhere"))
    code, out, _ = kernelhub("doctor")
    assert code == 1
    assert "IN THE WAY" in out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["get", "org/small"], 2, "exactly one of version and revision"),
        (["get", "org/small"], 2, "`kernelhub versions org/small` lists what there is"),
        (["get", "kernelhub/activtion@v1"], 1, "It has kernelhub/activation, kernelhub/decoder"),
        (["versions", "kernelhub/activtion"], 1, "(looked in the embedded hub)\n  It has kernelhub/activation"),
        (["build", "nowhere"], 2, "nowhere is not a folder"),
        (["build", "."], 2, "has no build.toml"),
        (["download", "."], 2, "`kernelhub lock` writes it"),
        (["bundle", "remove", "org/small"], 2, "no bundle brought org/small"),
        (["get", "org/small@v1:Layer"], 2, 'Use "org/small@v1".'),
        (["get", "org/small@0123abc"], 1, "It has v1. A commit is named by all of its 40 hex digits."),
        (["get", "small@v1"], 2, "does not name a kernel repository"),
        (["get", "org/none@v1"], 1, "was not found"),
        (["get", "org/small@v9"], 1, "v9"),
        (["get", "org/small@v1", "--backend", "cuda"], 2, "not supported on this machine"),
        (["get"], 2, "Missing argument"),
        (["nonsense"], 2, "nonsense"),
        (["publish", "nowhere", "hub", "--repo-id", "org/x"], 2, "nowhere"),
    ],
)
def test_errors_go_to_standard_error_with_their_exit_code(kernelhub, hub, tmp_path, monkeypatch, arguments, code, text):
    monkeypatch.chdir(tmp_path)
    found, out, err = kernelhub(*arguments)
    assert found == code
    assert text in err
    assert out == ""


def test_an_error_is_json_too_where_that_was_asked_for(kernelhub):
    code, out, _ = kernelhub("info", "org/none@v1", "--json")
    value = json.loads(out)
    assert (code, value["error"], value["exit_code"]) == (1, "KernelNotFound", 1)


def test_a_hub_that_cannot_be_reached_ends_with_3(kernelhub, tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELHUB_HUBS", str(tmp_path / "gone"))
    code, _, err = kernelhub("get", "org/small@v1")
    assert code == 3
    assert "gone" in err


def test_a_changed_kernel_ends_with_4(kernelhub, tmp_path, monkeypatch):
    folder = write_kernel(tmp_path / "k")
    (folder / "build/torch-cpu/__init__.py").write_text("changed\n")
    monkeypatch.setenv("LOCAL_KERNELS", f"org/k={folder}")
    assert kernelhub("get", "org/k@v1")[0] == 4


def test_a_table_is_whole_where_the_output_is_no_terminal(kernelhub, hub, tmp_path, monkeypatch):
    """A wrapped table is hard to search, however long its paths are."""
    monkeypatch.setenv("KERNELHUB_CACHE", str(tmp_path.joinpath(*["a" * 100] * 3)))
    code, out, err = kernelhub("info", "org/small@v1")
    assert (code, err) == (0, "")
    assert any("path" in line and "torch-cpu" in line for line in out.splitlines()), out


def test_a_title_is_whole_and_an_empty_table_says_so(kernelhub, hub, tmp_path):
    """A title was wrapped at the width of a table narrower than it."""
    store = str(tmp_path / "store")
    assert kernelhub("bundle", "list")[1] == f"{store}: nothing\n"
    assert kernelhub("cache", "list")[1] == f"{store}: nothing\n0 verdicts of proofs\n"
    assert kernelhub("versions", "org/small")[1].splitlines()[0] == f"org/small in {hub}"
    lines = kernelhub("info", "org/small@v1")[1].splitlines()
    assert (lines[0], lines[1].split()) == ("org/small@v1", ["kernel", "│", "org/small"]), "columns without names"


@pytest.mark.parametrize("columns", [80, 120])
def test_no_word_is_cut_where_a_terminal_is_narrow(kernelhub, hub, monkeypatch, columns):
    """Tables of a terminal's width had paths, digests and names of variants in pieces."""
    variant = "torch-stable-abi210-cpu-x86_64-linux"
    reason = "it was compiled there, from source: other compilers give other bytes"
    head = ("kernel", "commit", "variant", "digest", "layers", "here", "why")
    rows = [("kernelhub/rotary", "916edd75519f", variant, "sha256-Lqc3y5Kzjric", 3, "not checked", reason)] * 2
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys.stdout, "isatty", lambda: True)
        show_table("a receipt", head, rows)
        show_table("names and values", ("", ""), [("path", f"/{'a' * 150}"), ("empty", None)])
        why = ("torch-cuda", "no", "made for CUDA, wanted is the CPU")
        show_table("words wrap", ("variant", "runs here", "why not"), [(variant, "yes, and chosen", ""), why])
        out = kernelhub("versions", "org/small")[1]
    text = re.sub(r"\x1b\[[0-9;]*m", "", out)
    for word in {*(word for row in rows for cell in row for word in str(cell).split()), f"/{'a' * 150}", *head[1:]}:
        assert word in text.split(), word
    assert all(len(line) <= columns for line in text.splitlines() if "aaa" not in line and str(hub) not in line)
    assert text.count(variant) == 3


def test_one_thing_is_not_several(kernelhub, hub, tmp_path):
    kernelhub("get", "org/small@v1")
    assert kernelhub("cache", "prune", "org/small")[1].startswith("removed 1 folder and 0 verdicts, ")
    key = tmp_path / "key"
    assert kernelhub("keygen", key)[0] == 0
    code, out, err = kernelhub("revoke", hub, "--sign", key, "--commit", "0" * 40)
    assert (code, err) == (0, "")
    assert out.endswith(" has 1 commit and 0 keys\n")


def test_a_project_is_made_in_the_folder_that_one_is_in(kernelhub, tmp_path, monkeypatch):
    (tmp_path / "my-relu").mkdir()
    monkeypatch.chdir(tmp_path / "my-relu")
    assert kernelhub("init", ".")[0] == 0
    assert (tmp_path / "my-relu" / "torch-ext" / "my_relu" / "__init__.py").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_nobody_can_take_is_an_error_without_a_traceback(hub):
    command = f"{sys.executable} -m kernelhub versions org/small > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output could not be written: No space left on device")
    assert "Traceback" not in done.stderr


def test_serve_answers_until_ctrl_c(hub):
    command = [sys.executable, "-m", "kernelhub", "serve", str(hub), "--port", "0"]
    # A background job's children inherit that SIGINT is ignored; whoever presses Ctrl-C has a foreground job.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.rpartition("HF_ENDPOINT=")[2].strip()
        with urlopen(f"{url}/api/kernels/org/small/refs") as answer:
            assert [item["name"] for item in json.load(answer)["branches"]]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in err
    finally:
        process.kill()


def test_a_closed_pipe_ends_quietly(hub):
    command = f"{sys.executable} -m kernelhub cache list --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="bash closes the streams")
def test_without_streams_it_ends_quietly(hub):
    command = (
        f"{sys.executable} -m kernelhub variants kernelhub/norm@v1 >&- && {sys.executable} -m kernelhub cache list 2>&-"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_ends_with_130_and_no_traceback(kernelhub, monkeypatch):
    from kernelhub.hub.client import Hub

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Hub, "install", interrupted)
    code, _, err = kernelhub("get", "org/small@v1")
    assert code == 130
    assert "Traceback" not in err


def test_what_would_steer_a_terminal_is_written_out(kernelhub, tmp_path, monkeypatch):
    folder = write_kernel(tmp_path / "k", license="MIT \x1b[31m")
    monkeypatch.setenv("LOCAL_KERNELS", f"org/k={folder}")
    out = kernelhub("info", "org/k@v1")[1]
    assert "MIT \\x1b[31m" in out
    assert "\x1b[31m" not in out
