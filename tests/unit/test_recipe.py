"""build.toml: every key, the editions, and errors that name the line and the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernelhub.build.recipe import Binding, Recipe, Section, update
from kernelhub.build.toml import key_line
from kernelhub.core.metadata import KernelDepend
from kernelhub.core.refs import RepoId, Revision, Version
from kernelhub.errors import InvalidMetadata

EVERYTHING = """
[general]
name = "every-key"
version = 2
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda", "rocm", "xpu", "metal", "neuron", "tpu", "cann"]
upstream = "https://example.org/upstream.git"
source = "https://example.org/source.git"
python-depends = ["einops"]
kernel-depends = [{repo-id = "org/one", version = 1}, {repo-id = "org/two", revision = "main"}]

[general.hub]
repo-id = "org/every-key"
branch = "main"

[general.cuda]
minver = "12.6"
maxver = "13.1"
python-depends = ["nvidia-cutlass-dsl"]
kernel-depends = [{repo-id = "org/cuda", version = 3}]

[general.xpu]
python-depends = ["onednn"]

[general.neuron]
python-depends = ["nki"]

[general.tpu]
python-depends = []

[torch]
src = ["torch-ext/torch_binding.cpp", "torch-ext/torch_binding.h"]
include = ["include"]
minver = "2.9"
maxver = "2.13"
pyext = ["py", "json"]
cxx-flags = ["-Wall"]
stable-abi = {cpu = "2.10", cuda = "2.11"}

[kernel.on_cpu]
backend = "cpu"
depends = ["torch"]
src = ["cpu/one.cpp"]
include = ["cpu"]
cxx-flags = ["-O2"]

[kernel."on cuda"]
backend = "cuda"
depends = ["torch", "cutlass_3_8"]
src = ["cuda/one.cu"]
cuda-capabilities = ["9.0a"]
cuda-flags = ["-lineinfo"]
cuda-minver = "12.8"

[kernel.on_rocm]
backend = "rocm"
src = ["hip/one.cu"]
rocm-archs = ["gfx942"]
hip-flags = ["-O2"]

[kernel.on_xpu]
backend = "xpu"
depends = ["sycl_tla"]
src = ["xpu/one.cpp"]
sycl-flags = ["-O2"]

[kernel.on_metal]
backend = "metal"
depends = ["metal-cpp"]
src = ["metal/one.mm"]
"""


def test_every_key() -> None:
    recipe = Recipe.parse(EVERYTHING)
    assert (recipe.name, recipe.python_name, recipe.version, recipe.license) == (
        "every-key",
        "every_key",
        2,
        "Apache-2.0",
    )
    assert recipe.backends == ("cpu", "cuda", "rocm", "xpu", "metal", "neuron", "tpu", "cann")
    assert (recipe.upstream, recipe.source) == ("https://example.org/upstream.git", "https://example.org/source.git")
    assert (recipe.hub_repo, recipe.hub_branch) == ("org/every-key", "main")
    assert (recipe.cuda_minver, recipe.cuda_maxver) == ((12, 6), (13, 1))
    assert (recipe.pyext, recipe.noarch, recipe.tvm_ffi, recipe.notes) == (("py", "json"), False, False, ())
    assert recipe.binding == Binding(
        sources=("torch-ext/torch_binding.cpp", "torch-ext/torch_binding.h"),
        include=("include",),
        cxx_flags=("-Wall",),
        minver=(2, 9),
        maxver=(2, 13),
        stable_abi={"cpu": (2, 10), "cuda": (2, 11)},
    )
    assert recipe.sections == (
        Section("on_cpu", "cpu", ("cpu/one.cpp",), ("torch",), include=("cpu",), cxx_flags=("-O2",)),
        Section(
            "on cuda", "cuda", ("cuda/one.cu",), ("torch", "cutlass_3_8"),
            flags=("-lineinfo",), archs=("9.0a",), minver=(12, 8),
        ),
        Section("on_rocm", "rocm", ("hip/one.cu",), flags=("-O2",), archs=("gfx942",)),
        Section("on_xpu", "xpu", ("xpu/one.cpp",), ("sycl_tla",), flags=("-O2",)),
        Section("on_metal", "metal", ("metal/one.mm",), ("metal-cpp",)),
    )  # fmt: skip
    assert recipe.stable_abi_of("cuda") == (2, 11)
    assert recipe.stable_abi_of("rocm") is None
    assert recipe.python_depends_of("cuda") == ("einops", "nvidia-cutlass-dsl")
    assert recipe.python_depends_of("neuron") == ("einops", "nki")
    one, two = KernelDepend(RepoId("org", "one"), Version(1)), KernelDepend(RepoId("org", "two"), Revision("main"))
    assert recipe.kernel_depends_of("cpu") == (one, two)
    assert recipe.kernel_depends_of("cuda") == (one, two, KernelDepend(RepoId("org", "cuda"), Version(3)))


GENERAL = '[general]\nname = "small"\nversion = 1\nedition = 5\nlicense = "MIT"\nbackends = ["cpu", "cuda"]\n'


def test_noarch_and_tvm_ffi() -> None:
    noarch = Recipe.parse(
        GENERAL + '[torch-noarch]\npyext = [".py"]\ncuda_capabilities = ["9.0"]\nrocm_archs = ["gfx942"]\n'
    )
    assert (noarch.noarch, noarch.binding, noarch.pyext) == (True, None, ("py",))
    assert noarch.archs == {"cuda": ("9.0",), "rocm": ("gfx942",)}
    ffi = Recipe.parse(GENERAL + '[tvm-ffi]\nsrc = ["a.cc"]\ninclude = ["i"]\npyext = ["py"]\ncxx-flags = ["-O2"]\n')
    assert (ffi.tvm_ffi, ffi.noarch) == (True, False)
    assert ffi.binding == Binding(sources=("a.cc",), include=("i",), cxx_flags=("-O2",))


def test_a_project_may_have_compiled_and_noarch_variants_of_the_same_python() -> None:
    both = Recipe.parse(GENERAL + '[torch]\nsrc = ["a.cpp"]\n[torch-noarch]\n')
    assert both.noarch
    assert both.binding is not None


# As 5, with `language` where that has `backend`.
EDITION_6 = GENERAL.replace("edition = 5", "edition = 6") + '[torch]\n[kernel.a]\nlanguage = "cpp-cuda"\n'


def test_edition_6_has_a_language_where_5_has_a_backend() -> None:
    newest = Recipe.parse(EDITION_6 + 'src = ["a.cu"]\ncuda-flags = ["-O2"]\n')
    present = GENERAL + '[torch]\n[kernel.a]\nbackend = "cuda"\nsrc = ["a.cu"]\ncuda-flags = ["-O2"]\n'
    assert newest == Recipe.parse(present)
    assert newest.notes == ()


def test_a_noarch_kernel_may_have_an_empty_kernel_section() -> None:
    assert Recipe.parse(GENERAL + "[torch-noarch]\n\n[kernel]\n").sections == ()


def test_edition_4_has_no_edition() -> None:
    recipe = Recipe.parse(GENERAL.replace("edition = 5\n", "") + '[torch]\nsrc = ["a.cpp"]\nstable-abi = "2.11"\n')
    assert recipe.stable_abi_of("cpu") == recipe.stable_abi_of("cuda") == (2, 11)
    assert recipe.notes == ("general.edition is missing, the present one is 5",)


def test_edition_3_without_a_framework_is_noarch_and_may_lack_version_and_license() -> None:
    recipe = Recipe.parse('[general]\nname = "old"\nbackends = ["cuda"]\n')
    assert (recipe.noarch, recipe.version, recipe.license) == (True, 1, "unknown")
    assert len(recipe.notes) == 4


@pytest.mark.parametrize(
    "text",
    [
        '# mine\n[general]\nname = "old"  # this\nbackends = ["cuda"]\n',
        '[general]\nbackends = ["cuda"]\nname = "old"\nversion = 3\nlicense = "MIT"\n\n[torch]\nsrc = ["a.cpp"]\n',
        GENERAL.replace("edition = 5", "edition = 4 # of then") + "[torch-noarch]\n",
        '[general]\r\nname = "old"\r\nbackends = ["cuda"]',
    ],
)
def test_update_keeps_what_is_said(text: str) -> None:
    before, after = Recipe.parse(text), Recipe.parse(update(text))
    assert before.notes
    assert after.notes == ()
    unchanged = ("name", "version", "license", "backends", "noarch", "binding", "pyext", "sections")
    assert [getattr(after, key) for key in unchanged] == [getattr(before, key) for key in unchanged]
    assert [line for line in text.splitlines() if "edition" not in line and line not in update(text)] == []
    assert update(update(text)) == update(text)
    assert update(text).count("\r\n") == (update(text).count("\n") if "\r" in text else 0)


@pytest.mark.parametrize(
    "text",
    [
        'general.name = "old"\ngeneral.backends = ["cpu"]\n',
        'general = {name = "old", backends = ["cpu"]}\n',
        '[general]\nname = """\nold"""\nbackends = ["cpu"]\n',
        '[general]\nupstream = """\nname = 1\n"""\nname = "old"\nbackends = ["cpu"]\n',
        GENERAL.replace("edition = 5", "edition = 0x4") + "[torch-noarch]\n",
    ],
)
def test_what_lines_cannot_be_put_into_is_not_rewritten(text: str) -> None:
    """Each is read; written line by line it would say something else, or be no TOML."""
    assert Recipe.parse(text).notes
    with pytest.raises(InvalidMetadata) as caught:
        update(text)
    assert "edition = 5" in (caught.value.hint or "")


WRONG = [
    ("wrong = 1\n" + GENERAL + "[torch-noarch]\n", 1, "wrong: unknown key; expected one of general"),
    (GENERAL + "wrong = 1\n[torch-noarch]\n", 7, "general.wrong: unknown key"),
    (GENERAL + "[torch-noarch]\nwrong = 1\n", 8, "torch-noarch.wrong: unknown key"),
    (GENERAL + '[torch]\nsrc = ["a"]\n\n[kernel.a]\nbackend = "cpu"\nsrc = ["a"]\ncuda-flags = []\n', 13, "kernel.a.cuda-flags: unknown key"),
    (GENERAL + "[general.cuda]\n[general.neuron]\nminver = '1.0'\n[torch-noarch]\n", 9, "general.neuron.minver: unknown key"),
    (GENERAL + '[torch]\nstable-abi = {vulkan = "2.10"}\n', 8, "torch.stable-abi.vulkan: unknown key"),
    (GENERAL.replace('"small"', '"Small"') + "[torch-noarch]\n", 2, "general.name: expected lower-case"),
    (GENERAL.replace('"small"', '"con"') + "[torch-noarch]\n", 2, "general.name: 'con' cannot be a folder's name on every system"),
    (GENERAL.replace('name = "small"\n', "") + "[torch-noarch]\n", 1, "general.name: expected lower-case"),
    (GENERAL.replace("version = 1", 'version = "1"') + "[torch-noarch]\n", 3, "general.version: expected a whole number, got '1'"),
    (GENERAL.replace("version = 1", "version = -1") + "[torch-noarch]\n", 3, "general.version: expected a whole number, got -1"),
    (GENERAL.replace("version = 1", "version = true") + "[torch-noarch]\n", 3, "general.version: expected a whole number"),
    (GENERAL.replace("version = 1\n", "") + "[torch-noarch]\n", 1, "general.version: expected a whole number, got nothing"),
    (GENERAL.replace('"MIT"', '""') + "[torch-noarch]\n", 5, "general.license: expected text"),
    (GENERAL.replace("edition = 5", "edition = 7") + "[torch-noarch]\n", 4, "general.edition: expected a whole number from 3 to 6, got 7"),
    (GENERAL.replace("edition = 5", "edition = 2") + "[torch-noarch]\n", 4, "general.edition: expected a whole number from 3 to 6, got 2"),
    (EDITION_6 + 'backend = "cpu"\n', 10, "kernel.a.backend: unknown key; expected one of cuda-capabilities"),
    (EDITION_6.replace("cpp-cuda", "rust"), 9, "kernel.a.language: expected one of cpp-cpu, cpp-cuda, cpp-metal"),
    (EDITION_6.replace("cpp-cuda", "cuda"), 9, "kernel.a.language: expected one of cpp-cpu"),
    (EDITION_6.replace("cpp-cuda", "cpp-xpu"), 9, "kernel.a.language: 'xpu' is not in general.backends"),
    (GENERAL.replace('["cpu", "cuda"]', '["vulkan"]') + "[torch-noarch]\n", 6, "general.backends: expected some of cann, cpu"),
    (GENERAL.replace('["cpu", "cuda"]', "[]") + "[torch-noarch]\n", 6, "general.backends: expected some of"),
    (GENERAL.replace('["cpu", "cuda"]', '"cpu"') + "[torch-noarch]\n", 6, "general.backends: expected a list of text, got 'cpu'"),
    (GENERAL + "python-depends = [1]\n[torch-noarch]\n", 7, "general.python-depends: expected a list of text"),
    (GENERAL + "kernel-depends = [{repo-id = 'a/b'}]\n[torch-noarch]\n", 7, "general.kernel-depends: expected {repo-id"),
    (GENERAL + "kernel-depends = [{repo-id = 'ab', version = 1}]\n[torch-noarch]\n", 7, "general.kernel-depends: "),
    (GENERAL + "kernel-depends = [{repo-id = 'a/b', version = 1, x = 2}]\n[torch-noarch]\n", 7, "unknown key 'x'"),
    (GENERAL + "kernel-depends = 1\n[torch-noarch]\n", 7, "general.kernel-depends: expected a list of tables"),
    (GENERAL + "upstream = 1\n[torch-noarch]\n", 7, "general.upstream: expected text, got 1"),
    (GENERAL + "[general.hub]\nx = 1\n[torch-noarch]\n", 8, "general.hub.x: unknown key"),
    (GENERAL, 1, "torch: expected one of the sections [torch], [torch-noarch] and [tvm-ffi], got none"),
    (GENERAL + "torch-noarch = 1\n", 7, "general.torch-noarch: unknown key"),
    ("torch-noarch = 1\n" + GENERAL, 1, "torch-noarch: expected a section, got 1"),
    (GENERAL + "[torch]\n[tvm-ffi]\n", 8, "tvm-ffi: expected one framework"),
    (GENERAL + '[torch-noarch]\n[kernel.a]\nbackend = "cpu"\nsrc = ["a"]\n', 8, "kernel: a noarch kernel has no sources"),
    (GENERAL + '[torch]\nstable-abi = "2"\n', 8, "torch.stable-abi: expected a version such as"),
    (GENERAL + "[torch]\nstable-abi = 2.10\n", 8, "torch.stable-abi: expected text, got 2.1"),
    (GENERAL + '[torch]\nsrc = "a.cpp"\n', 8, "torch.src: expected a list of text"),
    (GENERAL + '[torch]\n[kernel.a]\nbackend = "vulkan"\nsrc = ["a"]\n', 9, "kernel.a.backend: expected one of cpu, cuda"),
    (GENERAL + '[torch]\n[kernel.a]\nbackend = "xpu"\nsrc = ["a"]\n', 9, "kernel.a.backend: 'xpu' is not in general.backends"),
    (GENERAL + '[torch]\n[kernel.a]\nbackend = "cpu"\nsrc = ["a"]\ndepends = ["boost"]\n', 11, "kernel.a.depends: expected torch"),
    (GENERAL + '[torch]\n[kernel.a]\nbackend = "cpu"\n', 8, "kernel.a.src: expected a list of source files, got none"),
    (GENERAL + '[torch]\ninclude = ["/tmp/ext"]\n', 8, "torch.include: expected folders inside the project, got '/tmp/ext'"),
    (GENERAL + '[torch]\n[kernel.a]\nbackend = "cpu"\nsrc = ["a"]\ninclude = ["a", "../shared"]\n', 11, "kernel.a.include: expected folders inside the project, got '../shared'"),
    (GENERAL + '[torch]\ninclude = ["a/../../b"]\n', 8, "torch.include: expected folders inside"),
    *(
        (GENERAL + f'[torch]\n[kernel.a]\nbackend = "cuda"\nsrc = ["a"]\ncuda-capabilities = ["9.0", "{wrong}"]\n', 11,
         f"kernel.a.cuda-capabilities: expected capabilities such as 9.0, 9.0a or 10.0+PTX, got '{wrong}'")
        for wrong in ("75", "sm_80", "9", "9.0b", "10.0+ptx", "")
    ),
    (GENERAL + '[torch-noarch]\ncuda_capabilities = ["sm_80"]\n', 8, "torch-noarch.cuda_capabilities: expected capabilities such as"),
    ("[torch-noarch]\n", 1, "general: expected this section, got nothing"),
    ('[general]\nname = "x"\nlanguage = "cuda"\n', 3, "general.language: this build.toml is older than edition 3"),
    ("[general]\n[torch]\nuniversal = true\n", 3, "torch.universal: this build.toml is older"),
    ('[general]\n[kernel.a]\nlanguage = "cuda"\n', 3, "kernel.a.language: this build.toml is older"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_what_is_wrong_is_named_with_line_and_key(text: str, line: int, message: str) -> None:
    with pytest.raises(InvalidMetadata) as caught:
        Recipe.parse(text)
    assert caught.value.message.startswith(f"line {line}: ")
    assert message in caught.value.message


def test_include_folders_are_relative_and_the_project_is_one() -> None:
    binding = Recipe.parse(GENERAL + '[torch]\ninclude = [".", "./", "a/b/", "./c"]\n').binding
    assert binding is not None
    assert binding.include == (".", "./", "a/b/", "./c")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidMetadata, match=r"has no build\.toml"):
        Recipe.load(tmp_path)
    file = tmp_path / "build.toml"
    file.write_bytes(b"\xff")
    with pytest.raises(InvalidMetadata, match="not UTF-8"):
        Recipe.load(tmp_path)
    file.write_text("[general\n")
    with pytest.raises(InvalidMetadata, match=r"build\.toml: .*line 1"):
        Recipe.load(tmp_path)
    file.write_bytes(b"\xef\xbb\xbf" + (GENERAL + "[torch-noarch]\n").encode())  # as some editors begin files
    assert Recipe.load(tmp_path).name == "small"
    file.write_text(GENERAL + "x = 1\n")
    with pytest.raises(InvalidMetadata, match=r"build\.toml: line 7: general\.x"):
        Recipe.load(tmp_path)


def test_lines_of_keys_in_every_spelling() -> None:
    text = '# a\n[ general ]\n"name" = 1\nhub.branch = 2\n\n[kernel."a b".c] # x\n\'src\' = [\n  1,\n]\n'
    assert key_line(text, ("general", "name")) == 3
    assert key_line(text, ("general", "hub", "branch")) == 4
    assert key_line(text, ("general", "missing")) == 2
    assert key_line(text, ("kernel", "a b", "c", "src")) == 7
    assert key_line(text, ("kernel", "a b", "c", "other")) == 6
    assert key_line(text, ("nowhere",)) == 1
