from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from kernelhub.errors import InvalidReference
from kernelhub.settings import Settings

KEY = "ed25519:" + "A" * 43 + "="


def test_without_variables_there_are_the_defaults() -> None:
    assert Settings.from_env({}) == Settings()
    settings = Settings()
    assert (settings.ref_ttl, settings.telemetry, settings.offline, settings.build) == (3600, True, False, "auto")
    assert settings.hf_endpoint == "https://huggingface.co"


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_every_setting_has_a_variable(name: str, tmp_path: Path) -> None:
    """An empty variable is as good as none, and each field follows a variable of formats.md, "Environment"."""
    variables = {
        "hubs": {"KERNELHUB_HUBS": "/srv/hub"},
        "cache": {"KERNELHUB_CACHE": "/srv/cache"},
        "offline": {"KERNELHUB_OFFLINE": "1"},
        "ref_ttl": {"KERNELHUB_REF_TTL": "5"},
        "verify_always": {"KERNELHUB_VERIFY": "always"},
        "build": {"KERNELHUB_BUILD": "never"},
        "trust": {"KERNELHUB_TRUST": "org/*"},
        "trusted_keys": {"KERNELHUB_TRUSTED_KEYS": KEY},
        "trusted_identities": {"KERNELHUB_TRUSTED_IDENTITIES": "org/*=me@example.org|https://issuer.example"},
        "require_signature": {"KERNELHUB_REQUIRE_SIGNATURE": "1"},
        "sigstore_root": {"KERNELHUB_SIGSTORE_ROOT": "/srv/trusted_root.json"},
        "local_kernels": {"LOCAL_KERNELS": f"org/name={tmp_path}"},
        "cxx": {"CXX": "clang++"},
        "cuda_home": {"CUDA_HOME": str(tmp_path)},
        "mapping_disabled": {"DISABLE_KERNEL_MAPPING": "1"},
        "hf_endpoint": {"HF_ENDPOINT": "https://hub.example"},
        "telemetry": {"DO_NOT_TRACK": "1"},
        "source_date_epoch": {"SOURCE_DATE_EPOCH": "1700000000"},
        "ranks_timeout": {"KERNELHUB_RANKS_TIMEOUT": "30"},
    }[name]
    settings = Settings.from_env(variables)
    assert [f.name for f in fields(Settings) if getattr(settings, f.name) != getattr(Settings(), f.name)] == [name]
    assert Settings.from_env(dict.fromkeys(variables, "")) == Settings()


def test_the_environment_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELHUB_HUBS", "one, two ,,three,")
    assert Settings.from_env().hubs == ("one", "two", "three")
    monkeypatch.delenv("KERNELHUB_HUBS")
    assert Settings.from_env().hubs == ()


def test_the_cache_of_the_kernels_package_goes_first() -> None:
    both = {"KERNELS_CACHE": "/srv/a", "KERNELHUB_CACHE": "/srv/b"}
    assert Settings.from_env(both).cache_folder == Path("/srv/a").absolute()
    assert Settings.from_env({**both, "KERNELS_CACHE": ""}).cache_folder == Path("/srv/b").absolute()


def test_the_cache_does_not_move_with_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.from_env({"KERNELHUB_CACHE": "cache"}).cache == tmp_path / "cache"


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert Settings.from_env({"KERNELHUB_CACHE": "~/c"}).cache == tmp_path / "c"


@pytest.mark.parametrize("name", ["KERNELS_CACHE", "KERNELHUB_CACHE"])
def test_a_home_of_nobodys_is_an_error_that_names_the_variable(name: str) -> None:
    with pytest.raises(InvalidReference, match=f"{name}: '~no-such-user/c'"):
        Settings.from_env({name: "~no-such-user/c"})
    with pytest.raises(InvalidReference, match="LOCAL_KERNELS: 'a/b=~no-such-user/c'"):
        Settings.from_env({"LOCAL_KERNELS": "a/b=~no-such-user/c"})


def test_without_a_variable_the_cache_is_the_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    from platformdirs import user_cache_path

    assert Settings().cache_folder == user_cache_path("kernelhub")
    assert Settings().cache_folder.name == "kernelhub"


def test_paths_may_be_given_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(cache="kernels", sigstore_root=str(tmp_path / "root"), cuda_home="~")
    assert settings == Settings(cache=Path.cwd() / "kernels", sigstore_root=tmp_path / "root", cuda_home=Path.home())
    assert replace(settings, offline=True).cache_folder == Path.cwd() / "kernels"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"cache": 5}, "Settings.cache: 5 is not a path"),
        ({"hubs": "/srv/hub"}, "Settings.hubs is '/srv/hub'"),
        ({"trust": "org/*"}, "Settings.trust is 'org/\\*'"),
        ({"build": "Always"}, "Settings.build is 'Always'"),
    ],
)
def test_what_would_be_taken_for_something_else_is_an_error(given: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidReference, match=match):
        Settings(**given)


@pytest.mark.parametrize("value", ["1", "on", "yes", "true", "ON", "Yes", "tRuE", " 1 "])
@pytest.mark.parametrize("name", ["DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"])
def test_each_variable_turns_telemetry_off(name: str, value: str) -> None:
    assert not Settings.from_env({name: value}).telemetry


@pytest.mark.parametrize("value", ["", "0", "off", "no", "false", "FALSE"])
def test_telemetry_stays_on_otherwise(value: str) -> None:
    assert Settings.from_env(dict.fromkeys(["DISABLE_TELEMETRY", "DO_NOT_TRACK"], value)).telemetry


@pytest.mark.parametrize("name", ["KERNELHUB_OFFLINE", "HF_HUB_OFFLINE"])
def test_either_variable_means_offline(name: str) -> None:
    other = {"KERNELHUB_OFFLINE": "0", "HF_HUB_OFFLINE": "0"}
    assert Settings.from_env({**other, name: "1"}).offline
    assert not Settings.from_env(other).offline


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KERNELHUB_OFFLINE", "maybe"),
        ("DISABLE_KERNEL_MAPPING", "y"),
        ("SOURCE_DATE_EPOCH", "yesterday"),
        ("KERNELHUB_REF_TTL", "an hour"),
        ("KERNELHUB_REF_TTL", "-1"),
        ("KERNELHUB_REF_TTL", "nan"),
        ("KERNELHUB_REF_TTL", "inf"),
        ("KERNELHUB_VERIFY", "never"),
        ("KERNELHUB_BUILD", "sometimes"),
        ("KERNELHUB_TRUST", "org"),
        ("LOCAL_KERNELS", "org/name"),
        ("LOCAL_KERNELS", "name=/srv"),
        ("LOCAL_KERNELS", "org/name="),
        ("LOCAL_KERNELS", "=/srv"),
    ],
)
def test_a_malformed_value_is_an_error_that_shows_variable_and_value(name: str, value: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        Settings.from_env({name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "Expected" in str(caught.value)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "DO_NOT_TRACK", "DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"])
def test_odd_values_of_variables_that_other_packages_read_too_are_off(name: str) -> None:
    assert Settings.from_env({name: "please"}) == Settings()


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("1.5", 1.5), (" 60 ", 60)])
def test_the_time_to_live_is_in_seconds(text: str, seconds: float) -> None:
    assert Settings.from_env({"KERNELHUB_REF_TTL": text}).ref_ttl == seconds


def test_choices_are_read_in_any_case() -> None:
    settings = Settings.from_env({"KERNELHUB_VERIFY": "ALWAYS", "KERNELHUB_BUILD": "Never"})
    assert (settings.verify_always, settings.build) == (True, "never")


def test_an_endpoint_ends_without_a_slash() -> None:
    assert Settings.from_env({"HF_ENDPOINT": "http://127.0.0.1:80/"}).hf_endpoint == "http://127.0.0.1:80"


def test_local_kernels_are_folders_by_repository(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    entries = [f"org/one={tmp_path / 'a=b'}", f" org/two = {tmp_path} ", ""]
    settings = Settings.from_env({"LOCAL_KERNELS": os.pathsep.join(entries)})
    assert settings.local_kernels == (("org/one", tmp_path / "a=b"), ("org/two", tmp_path))


def test_a_local_kernel_that_is_not_there_is_an_error_that_shows_the_entry(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("gone", "file"):
        entry = f"org/name={tmp_path / name}"
        with pytest.raises(InvalidReference, match="is not a folder") as caught:
            Settings.from_env({"LOCAL_KERNELS": os.pathsep.join([f"org/ok={tmp_path}", entry])})
        assert repr(entry) in str(caught.value)


# What a project's file says


def project(folder: Path, text: str) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    return {"KERNELHUB_PROJECT": str(folder)}


def test_a_project_that_the_user_names_says_what_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# ours\n{KEY} alice\n\n{KEY.replace('A', 'B', 1)}\n")
    text = f"""
[tool.kernelhub]
trust = ["org/*"]
trusted_keys = ["keys", "acme/*={KEY}"]
trusted_identities = ["acme/*=me@example.org|https://issuer.example"]
require_signature = true
[tool.kernelhub.dependencies]
"org/name" = 1
"""
    for env in (project(tmp_path, text), {"KERNELHUB_PROJECT": str(tmp_path / "pyproject.toml")}):
        settings = Settings.from_env({**env, "KERNELHUB_TRUST": "mine/*"})
        assert settings.trust == ("mine/*", "org/*")
        assert [str(key) for key in settings.trusted_keys] == [KEY, KEY.replace("A", "B", 1), f"acme/*={KEY}"]
        assert [str(item) for item in settings.trusted_identities] == ["acme/*=me@example.org|https://issuer.example"]
        assert settings.require_signature


def test_a_project_that_nobody_named_grants_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """needs 2: a cloned repository brings a pyproject.toml; being in its folder is no consent to what it says."""
    project(tmp_path, '[tool.kernelhub]\ntrust = ["evil/*"]\n')
    monkeypatch.chdir(tmp_path)
    assert Settings.from_env({}) == Settings()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[tool", "not TOML"),
        ("[tool]\nkernelhub = 5", "not a table"),
        ("tool = 5", "not a table"),
        ('[tool.kernelhub]\ntrust = "org/*"', "trust must be a list"),
        ("[tool.kernelhub]\ntrust = [5]", "trust must be a list"),
        ('[tool.kernelhub]\ntrust = ["org"]', "does not name what to trust"),
        ('[tool.kernelhub]\nrequire_signature = "yes"', "must be true or false"),
        ("[tool.kernelhub]\nrequire_signatures = true", "has require_signatures"),
        ('[tool.kernelhub]\ntrusted_keys = ["none.pub"]', "neither a key nor a file"),
        ('[tool.kernelhub]\ntrusted_keys = ["~nobody-here/x.pub"]', "Write the path without"),
        ('[tool.kernelhub]\ntrusted_keys = ["a\\u0000b"]', "neither a key nor a file"),
        ('[tool.kernelhub]\ntrusted_keys = ["/dev/zero"]', "it is no file"),
        ('[tool.kernelhub]\ntrusted_keys = ["."]', "it is no file"),
        ('[tool.kernelhub]\ntrusted_identities = ["me"]', "not a trusted identity"),
    ],
)
def test_a_project_that_says_nonsense_is_an_error_and_names_the_file(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(InvalidReference, match=match) as caught:
        Settings.from_env(project(tmp_path, text))
    assert f"KERNELHUB_PROJECT: {tmp_path / 'pyproject.toml'}" in str(caught.value)


def test_a_project_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidReference, match="cannot read it"):
        Settings.from_env({"KERNELHUB_PROJECT": str(tmp_path)})


def test_a_project_that_is_a_device_is_an_error() -> None:
    with pytest.raises(InvalidReference, match="it is no file"):
        Settings.from_env({"KERNELHUB_PROJECT": "/dev/zero"})


def test_keys_come_as_text_or_in_files_each_for_all_or_for_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a key.pub").write_text(f"{KEY} id\n")
    read = Settings.from_env({"KERNELHUB_TRUSTED_KEYS": f"{KEY}, org/*={tmp_path / 'a key.pub'}"}).trusted_keys
    assert [str(item) for item in read] == [KEY, f"org/*={KEY}"]


@pytest.mark.parametrize("content", [None, "", "# nothing\n", "garbage\n", b"\xff\xfe"])
def test_a_file_that_holds_no_keys_is_an_error(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidReference, match="KERNELHUB_TRUSTED_KEYS"):
        Settings.from_env({"KERNELHUB_TRUSTED_KEYS": str(path)})


@pytest.mark.parametrize("value", ["maybe", "2"])
def test_whether_a_signature_is_required_is_said_plainly(value: str) -> None:
    with pytest.raises(InvalidReference, match="KERNELHUB_REQUIRE_SIGNATURE"):
        Settings.from_env({"KERNELHUB_REQUIRE_SIGNATURE": value})
