"""Configs in files and on hubs: what comes back, and what a file may not decide."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelhub import (
    HubUnavailable,
    KernelConfig,
    KernelHubWarning,
    KernelNotFound,
    LayerRepository,
    LocalLayerRepository,
    Mode,
)

CONFIG = KernelConfig(
    {
        "SiLU": {"cuda": "org/a@main:SiLU", "cpu": ("org/a:SiLU", {"version": 2})},
        "RMSNorm": "kernelhub/norm:RMSNorm",
        "Gate": {"cpu": {Mode.TRAINING | Mode.TORCH_COMPILE: LayerRepository("org/g", layer_name="G", version=1)}},
    },
    inherit_mapping=False,
)
KEY = (("RMSNorm", "layers.*.norm"), ("MLP", "layers.*.mlp"))
FUSION = {"layers": [list(item) for item in KEY], "kernel": "org/fused:Both"}

_segment = st.from_regex(r"[a-z][a-z0-9]{0,6}", fullmatch=True)
_texts = st.builds("{}/{}:{}".format, _segment, _segment, _segment)
_values = st.one_of(
    _texts,
    st.tuples(_texts, st.fixed_dictionaries({"version": st.integers(0, 9)})),
    st.tuples(_texts, st.fixed_dictionaries({"revision": _segment, "trust_remote_code": st.just(False)})),
)
_devices = st.dictionaries(
    st.sampled_from(["cpu", "cuda"]),
    st.one_of(_values, st.dictionaries(st.sampled_from(list(Mode)), _values, min_size=1)),
)
_key = st.lists(_segment, min_size=1, max_size=3, unique=True).map(
    lambda names: tuple((name.upper(), f"layers.*.{name}") for name in names)
)
_mappings = st.dictionaries(st.one_of(_segment, _key), st.one_of(_values, _devices))


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Nothing warns but where the test says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelHubWarning)
        yield


@given(_mappings, st.booleans())
def test_what_was_saved_and_loaded_compares_equal(mapping: dict[str, Any], inherit: bool) -> None:
    config = KernelConfig(mapping, inherit_mapping=inherit)
    loaded = KernelConfig.from_dict(json.loads(config.to_text()))
    assert loaded == config
    assert loaded.to_text() == config.to_text()


def test_the_file_is_sorted_and_the_same_in_any_order(tmp_path: Path) -> None:
    path = CONFIG.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == "kernel_config.json"
    turned = KernelConfig(dict(reversed(CONFIG.kernel_mapping.items())), inherit_mapping=False)
    assert turned.save_pretrained(tmp_path).read_bytes() == path.read_bytes()
    value = json.loads(path.read_text())
    assert list(value) == sorted(value)
    assert value["schema_version"] == 1
    assert value["kernel_mapping"]["Gate"] == {"cpu": {"TRAINING|TORCH_COMPILE": "org/g@v1:G"}}
    assert KernelConfig.from_pretrained(path.parent) == CONFIG
    assert KernelConfig.from_pretrained(str(path.parent)) == CONFIG


def test_several_layers_with_one_kernel_are_saved_in_a_list(tmp_path: Path) -> None:
    config = KernelConfig({"SiLU": "org/a:SiLU", KEY: "org/fused:Both"})
    value = json.loads(config.save_pretrained(tmp_path).read_text())
    assert value["kernel_mapping"] == {"SiLU": "org/a:SiLU"}
    assert value["fusions"] == [FUSION]
    assert KernelConfig.from_pretrained(tmp_path) == config
    assert "fusions" not in KernelConfig({"SiLU": "org/a:SiLU"}).to_dict()


def test_a_file_with_fusions_grants_nothing_either(tmp_path: Path) -> None:
    trusted = {KEY: ("org/fused:Both", {"version": 1, "trust_remote_code": True})}
    with pytest.warns(KernelHubWarning, match="asks for trust in fusions") as warned:
        loaded = KernelConfig.from_dict(KernelConfig(trusted).to_dict())
    assert [item.filename for item in warned] == [__file__]
    assert loaded.kernel_mapping == {KEY: ("org/fused:Both", {"version": 1})}
    local = KernelConfig({KEY: f"{tmp_path}:Both"}, use_local_kernel=True)
    with pytest.warns(KernelHubWarning, match="names folders in fusions"):
        assert KernelConfig.from_dict(local.to_dict()).kernel_mapping == {}


def test_a_config_is_saved_as_it_was_written_after_it_was_made() -> None:
    from torch import nn

    text = CONFIG.to_text()
    CONFIG.create_compatible_mapping(nn.Linear(2, 2))
    assert CONFIG.to_text() == text


def test_a_list_of_kernels_is_saved_and_loaded(tmp_path: Path) -> None:
    both = ["kernelhub/norm:RMSNorm", ("org/norm:RMSNorm", {"version": 2})]
    config = KernelConfig({"RMSNorm": {"cpu": both, "cuda": both[0]}, "SiLU": ["org/a:SiLU", "org/b@v2:SiLU"]})
    config.save_pretrained(tmp_path)
    assert KernelConfig.from_pretrained(tmp_path) == config


def test_each_kernel_of_a_list_is_granted_for_itself() -> None:
    asking = {"RMSNorm": ["/kernels/norm:RMSNorm", ["org/norm:RMSNorm", {"version": 2, "trust_remote_code": True}]]}
    with pytest.warns(KernelHubWarning) as said:
        read = KernelConfig.from_dict({"schema_version": 1, "kernel_mapping": asking})
    assert "trust in kernel_mapping['RMSNorm'][1]" in str(said[0].message)
    assert "folders in kernel_mapping['RMSNorm'][0]" in str(said[0].message)
    assert read.kernel_mapping == {"RMSNorm": [("org/norm:RMSNorm", {"version": 2})]}


# What a file may not decide


def test_a_file_grants_no_trust() -> None:
    """needs 2: loading a config never lets code run."""
    written = KernelConfig(
        {
            "A": ("org/a:A", {"version": 2, "trust_remote_code": True}),
            "B": {"cpu": {Mode.INFERENCE: LayerRepository("org/b", layer_name="B", version=1, trust_remote_code=True)}},
            "C": "org/c:C",
        }
    )
    value = json.loads(written.to_text())
    with pytest.warns(KernelHubWarning, match=r"kernel_mapping\['A'\], .*'B'.*trust_remote_code=True") as caught:
        loaded = KernelConfig.from_dict(value)
    assert caught[0].filename == __file__
    assert loaded == KernelConfig(
        {"A": ("org/a:A", {"version": 2}), "B": {"cpu": {Mode.INFERENCE: "org/b@v1:B"}}, "C": "org/c:C"}
    )
    assert KernelConfig.from_dict(value, trust_remote_code=True) == written


def test_a_file_names_no_folders(tmp_path: Path) -> None:
    written = KernelConfig({"A": f"{tmp_path}:A", "B": {"cpu": r"C:\kernels:B"}}, use_local_kernel=True)
    value = json.loads(written.to_text())
    for grants in ({}, {"trust_remote_code": True}):
        with pytest.warns(KernelHubWarning, match="'A'.*'B'.*use_local_kernel=True"):
            loaded = KernelConfig.from_dict(value, **grants)
        assert loaded == KernelConfig()
    assert KernelConfig.from_dict(value, use_local_kernel=True) == written
    hidden = {"schema_version": 1, "kernel_mapping": {"A": f"{tmp_path}:A"}}
    with pytest.warns(KernelHubWarning, match="use_local_kernel=True"):
        assert KernelConfig.from_dict(hidden).kernel_mapping == {}


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"schema_version": 2}, "schema_version is 2"),
        ({"schema_version": None}, "schema_version is None"),
        ({"schema_version": True}, "schema_version is True"),
        ({"kernel_maping": {}}, "did you mean 'kernel_mapping'"),
        ({"kernel_mapping": []}, "is an object from layer names"),
        ({"kernel_mapping": {"A": 1}}, r"kernel_mapping\['A'\]: expected"),
        ({"kernel_mapping": {"A": []}}, r"kernel_mapping\['A'\]: there is no kernel in the list"),
        ({"kernel_mapping": {"A": ["org/a:A", 1]}}, r"kernel_mapping\['A'\]\[1\]: expected"),
        ({"kernel_mapping": {"A": ["org/a:A", ["org/a:A"]]}}, r"kernel_mapping\['A'\]\[1\]: expected"),
        ({"kernel_mapping": {"A": {"cpu": {"FAST": "org/a:A"}}}}, "'FAST' is not a mode"),
        ({"kernel_mapping": {"A": {"cpu": {"TRAINING|INFERENCE": "org/a:A"}}}}, "is not a mode"),
        ({"kernel_mapping": {"A": {"cpu": {"TRAINING": {"x": "org/a:A"}}}}}, "expected a kernel"),
        ({"kernel_mapping": {"A": {"cpu": {"": "org/a:A"}}}}, "is not a mode"),
        ({"fusions": {}}, "fusions is a list"),
        ({"fusions": [1]}, r"fusions\[0\]: expected an object of layers and kernel"),
        ({"fusions": [{**FUSION, "more": 1}]}, r"fusions\[0\]: expected an object of layers and kernel"),
        ({"fusions": [{**FUSION, "layers": []}]}, r"fusions\[0\]: it names no layers"),
        ({"fusions": [{**FUSION, "layers": [["A", {}]]}]}, r"fusions\[0\]: .* is not a layer's name and a path"),
        ({"fusions": [{**FUSION, "layers": [["A", "a.b"], ["B", "c.d"]]}]}, "different parents"),
        ({"fusions": [{**FUSION, "kernel": 1}]}, r"fusions\[.*\]: expected"),
        ({"fusions": [FUSION, FUSION]}, r"fusions\[1\]: the same layers again"),
        ({"use_local_kernel": 1}, "use_local_kernel is true or false"),
        ({"inherit_mapping": "no"}, "inherit_mapping is true or false"),
    ],
)
def test_malformed_files_are_named(change: dict[str, Any], fact: str, tmp_path: Path) -> None:
    (tmp_path / "kernel_config.json").write_text(json.dumps({**CONFIG.to_dict(), **change}))
    with pytest.raises(ValueError, match=fact) as caught:
        KernelConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_what_is_no_json_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no kernel_config.json"):
        KernelConfig.from_pretrained(tmp_path)
    (tmp_path / "kernel_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        KernelConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a repository"):
        KernelConfig.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        KernelConfig.from_pretrained(tmp_path / "nothing")


def test_what_cannot_be_saved_says_where() -> None:
    patterns = LayerRepository("org/a", layer_name="A", version=1, trust_remote_code=["org/*"])
    with pytest.raises(ValueError, match=r"kernel_mapping\['A'\]: .*cannot be saved"):
        KernelConfig({"A": patterns}).to_dict()
    with pytest.raises(ValueError, match=r"kernel_mapping\['A'\]\['cpu'\]: 7 cannot be saved"):
        KernelConfig({"A": {"cpu": 7}}).to_dict()
    assert KernelConfig({"A": patterns}) == KernelConfig({"A": patterns})


def test_a_local_repository_is_saved_as_its_path(tmp_path: Path) -> None:
    repository = LocalLayerRepository(tmp_path, layer_name="A")
    written = KernelConfig({"A": repository}, use_local_kernel=True)
    assert written.to_dict()["kernel_mapping"] == {"A": f"{tmp_path}:A"}


# Hubs


def test_a_hub_in_a_folder_has_it_beside_the_commits(tmp_path: Path) -> None:
    hub = str(tmp_path / "hub")
    assert CONFIG.push_to_hub("org/model", hub=hub) == f"{hub}/org/model/kernel_config.json"
    assert KernelConfig.from_pretrained("org/model", hub=hub) == CONFIG
    KernelConfig({"A": "org/a:A"}).push_to_hub("org/model", hub=hub)
    assert KernelConfig.from_pretrained("org/model", hub=hub) == KernelConfig({"A": "org/a:A"})
    with pytest.raises(KernelNotFound, match="org/other/kernel_config.json"):
        KernelConfig.from_pretrained("org/other", hub=hub)
    with pytest.raises(HubUnavailable, match="is not a folder"):
        KernelConfig.from_pretrained("org/model", hub=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="has no revisions"):
        KernelConfig.from_pretrained("org/model", hub=hub, revision="main")
    with pytest.raises(ValueError, match="does not name a kernel repository"):
        CONFIG.push_to_hub("model", hub=hub)


def test_a_kernel_of_the_same_name_is_untouched(tmp_path: Path) -> None:
    from kernelfiles import write_kernel

    from kernelhub.core.refs import RepoId
    from kernelhub.hub.publish import publish

    hub = str(tmp_path / "hub")
    folder, repo = write_kernel(tmp_path / "small"), RepoId.parse("org/small")
    published = publish(folder, hub, repo, epoch=0)
    CONFIG.push_to_hub("org/small", hub=hub)
    assert publish(folder, hub, repo, epoch=0).commit == published.commit


COMMIT = "c" * 40


class _HuggingFace(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as one upload and one download ask for."""

    files: dict[str, bytes]
    asked: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(f"POST {self.path}")
        if self.path.endswith("/repos/create"):
            self._json({"url": f"http://{self.headers['Host']}/org/model", "name": "org/model"})
        elif "/preupload/" in self.path:
            named = [row["path"] for row in json.loads(body)["files"]]
            self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in named]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"commitUrl": f"http://{self.headers['Host']}/org/model/commit/{COMMIT}", "commitOid": COMMIT})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        name = self.path.rpartition("/")[2]
        data = self.files.get(name)
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            data = b""
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _json(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def hugging_face() -> Iterator[tuple[str, type[_HuggingFace]]]:
    handler = type("Handler", (_HuggingFace,), {"files": {}, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler
        finally:
            server.shutdown()
            thread.join(timeout=10)


def test_the_hugging_face_hub_gets_one_commit_and_gives_it_back(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment once."""
    code = """
from kernelhub import KernelConfig, KernelNotFound
config = KernelConfig({"A": ("org/a:A", {"version": 2})})
print(config.push_to_hub("org/model", token="hf_x"))
assert KernelConfig.from_pretrained("org/model") == config
"""
    offline = """
from kernelhub import KernelConfig, HubUnavailable
assert KernelConfig.from_pretrained("org/model") == KernelConfig({"A": ("org/a:A", {"version": 2})})
for attempt in (lambda: KernelConfig().push_to_hub("org/model"), lambda: KernelConfig.from_pretrained("org/other")):
    try:
        attempt()
    except HubUnavailable:
        continue
    raise SystemExit("expected HubUnavailable")
"""
    missing = """
from kernelhub import KernelConfig, KernelNotFound
try:
    KernelConfig.from_pretrained("org/model", token=False)
except KernelNotFound as error:
    print(error)
"""
    with hugging_face() as (endpoint, server):
        assert COMMIT in _run(code, tmp_path, endpoint)
        assert json.loads(server.files["kernel_config.json"])["schema_version"] == 1
        assert [line for line in server.asked if "/commit/" in line] == ["POST /api/models/org/model/commit/main"]
        server.asked.clear()
        _run(offline, tmp_path, endpoint, KERNELHUB_OFFLINE="1")
        assert server.asked == []
        server.files.clear()
        assert "reading kernel_config.json of org/model" in _run(missing, tmp_path / "fresh", endpoint)
    _run(offline, tmp_path, endpoint, HF_HUB_OFFLINE="1")
    away = "from kernelhub import KernelConfig; KernelConfig.from_pretrained('org/other')"
    assert "HubUnavailable: reading kernel_config.json of org/other" in _run(away, tmp_path, endpoint, check=False)
    assert "HubUnavailable: uploading kernel_config.json" in _run(code, tmp_path, endpoint, check=False)


def _run(code: str, home: Path, endpoint: str, *, check: bool = True, **env: str) -> str:
    """Run the code with the hub at `endpoint`; what it printed, or where it failed its last line."""
    variables = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **env}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout if done.returncode == 0 else done.stderr
