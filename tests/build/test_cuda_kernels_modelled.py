"""The CUDA kernels' own sources, run without a GPU: compiled for the host with tests/cuda_model, which says what it models."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from cuda_model.translate import Unmodelled, translate_all, translated

from kernelhub.build.toolchain import Toolchain

KERNELS = Path(__file__).parents[2] / "kernels"
MODEL = Path(__file__).parents[1] / "cuda_model"
SOURCES = {name: KERNELS / name / f"{name}_cuda" for name in ("activation", "decoder", "loss", "norm", "rotary")}

# A process that has not ended after that many seconds never will. Threads that wait for each other are not waited for: the
# model sees that nothing can happen any more.
NEVER = 240
SANITIZE = ("-fsanitize=thread", "-g1")
RACE = 66  # the sanitizer's exit status

Change = Callable[[str], str]


class Programs:
    """Translated sources, compiled once each, and programs linked from them."""

    def __init__(self, compiler: tuple[str, ...], cuda: Path, folder: Path) -> None:
        self.compiler, self.cuda, self.folder = compiler, cuda, folder
        self.sanitizes = cache(self._sanitizes)
        self.program = cache(self._program)
        self.model = cache(self._model)

    def planted(self, kernel: str, old: str, new: str, source: str, *, sanitize: bool = False) -> Path:
        """The kernel's program with a mistake in one of its sources (or in a header that this one includes)."""
        seen = 0

        def mistaken(text: str) -> str:
            nonlocal seen
            seen += text.count(old)
            return text.replace(old, new)

        folder = self.folder / f"planted{len(list(self.folder.glob('planted*')))}"
        objects = self._objects(kernel, folder, mistaken, only=source, sanitize=sanitize)
        assert seen == 1, f"{old!r} is {seen} times in the sources"
        return self._linked(kernel, folder, objects, sanitize)

    def sanitized(self, kernel: str, source: str) -> Path:
        """The kernel's program, with one of its sources under the thread sanitizer."""
        folder = self.folder / f"{kernel}-{source}-sanitized"
        objects = self._objects(kernel, folder, lambda text: text, only=source, sanitize=True)
        return self._linked(kernel, folder, objects, True)

    def _program(self, kernel: str) -> Path:
        folder = self.folder / kernel
        objects = self._objects(kernel, folder, lambda text: text)
        program = folder / "program"
        self._run("-o", program, *objects, self.model(False), "-pthread")
        return program

    def _linked(self, kernel: str, folder: Path, objects: list[Path], sanitize: bool) -> Path:
        """These objects with the others that the kernel's own program has."""
        own = {path.name for path in objects}
        others = [path for path in self.program(kernel).parent.glob("*.o") if path.name not in own]
        program, flags = folder / "program", SANITIZE if sanitize else ()
        self._run(*flags, "-o", program, *objects, self.model(sanitize), *others, "-pthread")
        return program

    def _objects(
        self, kernel: str, folder: Path, changed: Change, *, only: str | None = None, sanitize: bool = False
    ) -> list[Path]:
        folder.mkdir()
        dtypes = ("float16", "float32") if sanitize else ("float16",)
        translate_all(SOURCES[kernel], folder, lambda text: changed(without(text, dtypes)))
        sources = [folder / f"{only}.cpp"] if only else [*folder.glob("*.cpp"), MODEL / f"{kernel}.cpp"]
        # The longest first: that is about the longest text.
        sources.sort(key=lambda path: path.stat().st_size, reverse=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda source: self._object(source, folder, folder, sanitize), sources))

    def _model(self, sanitize: bool) -> Path:
        folder = self.folder / f"model{sanitize:d}"
        folder.mkdir()
        return self._object(MODEL / "model.cpp", folder, folder, sanitize)

    def _object(self, source: Path, include: Path, to: Path, sanitize: bool) -> Path:
        made = to / f"{source.stem}.o"
        headers = ("-I", include, "-I", MODEL, "-isystem", self.cuda / "include")
        # Kernels take longer to compile than to run, and the model the other way round. No fused operations that the
        # source does not ask for.
        optimise = "-O1" if sanitize or source.parent == MODEL else "-O0"
        flags = ("-std=c++17", optimise, "-ffp-contract=off", "-w", *(SANITIZE if sanitize else ()))
        self._run(*flags, *headers, "-c", source, "-o", made)
        return made

    def _sanitizes(self) -> bool:
        source = self.folder / "sanitized.cpp"
        source.write_text("int main() { return 0; }\n")
        try:
            self._run(*SANITIZE, source, "-o", source.with_suffix(""))
        except AssertionError:
            return False
        return subprocess.run([source.with_suffix("")], capture_output=True).returncode == 0

    def _run(self, *arguments: str | Path) -> None:
        done = subprocess.run([*self.compiler, *arguments], capture_output=True, text=True, timeout=NEVER)
        assert done.returncode == 0, done.stderr


def without(text: str, dtypes: tuple[str, ...]) -> str:
    """The norms for the other dtypes only: what is not run need not be compiled."""
    for dtype, name in (("float16", "Half"), ("float32", "float")):
        if dtype in dtypes:
            text = text.replace(f"return run({name}{{}});", f'model::fail("{dtype} is not compiled");')
    return text


@pytest.fixture(scope="module")
def programs(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    if toolchain.nvcc is None or toolchain.cuda_root is None:
        pytest.skip("no nvcc")
    assert toolchain.cxx is not None
    return Programs(toolchain.cxx.command, toolchain.cuda_root, tmp_path_factory.mktemp("modelled"))


@pytest.fixture
def sanitizing(programs: Programs) -> Programs:
    if not programs.sanitizes():
        pytest.skip("this compiler has no thread sanitizer, or its programs do not start here")
    return programs


def run(program: Path, case: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE}"}
    try:
        done = subprocess.run([program, *case.split()], capture_output=True, text=True, env=environment, timeout=NEVER)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{case}: not done after {NEVER} seconds")
    return done


def check(program: Path, case: str) -> None:
    done = run(program, case)
    assert done.returncode == 0, f"{case}: exit status {done.returncode}\n{done.stderr[:8000]}"


# Each: when copies happen, dtype, rows, depth, multiprocessors (two for a pair of blocks), the op and its own arguments, which
# decoder.cpp says. A tile of a pair of blocks is 256 rows and 256 columns (128 of a gated product), a step 64 deep, and four
# steps are at hand; of what follows a tile, a part goes with each step of the next one.
DECODER = [
    # One element of each tile; one step; all that follows a tile is done behind it
    "late bfloat16 1 8 2 add 8",
    "any bfloat16 1 8 2 gated 8 0 1",
    "early bfloat16 1 8 2 projections 1 1 64",
    # A row and a few columns more than whole tiles, more tiles than pairs of blocks, some with no rows for the other block
    "late bfloat16 513 72 2 add 520",
    "early bfloat16 513 72 4 gated 264 2 0",
    "any bfloat16 513 72 2 projections 5 513 64",
    # More steps than are at hand
    "early bfloat16 300 328 2 add 264",
    "any float16 130 584 4 gated 264 0 0",
    # Both products of an MLP in one launch: one pair of blocks, and several that wait for each other; with and without a and b;
    # more tiles of either kind than pairs, and fewer; few steps of either kind, and more than what follows a tile has parts (19,
    # 27 with a and b)
    "late bfloat16 1 8 2 mlp 8 0 0 8",
    "any bfloat16 513 72 2 mlp 136 2 1 264",
    "any bfloat16 513 72 4 mlp 264 0 0 264",
    "late bfloat16 300 1304 4 mlp 136 0 1 520",
    "early float16 600 328 6 mlp 264 2 1 8",
    "any bfloat16 1100 8 4 mlp 136 0 0 8",
    "any bfloat16 1 8 8 mlp 8 0 0 8",
    "late bfloat16 1 8 8 mlp 8 0 0 1032",
    "any bfloat16 1 8 8 mlp 520 0 0 8",
    "late bfloat16 300 1304 4 mlp 264 0 0 264",
    "any bfloat16 300 1800 4 mlp 264 2 1 264",
    # More blocks than can be at work at a time: one product after the other
    "any bfloat16 300 72 10 mlp 136 0 1 264",
    # As many steps as what follows has parts: 16, 24 with a and b, 10, 16 and 28 with heads of 64, 128 and 256
    "any float16 300 1096 2 add 264",
    "late bfloat16 140 1672 2 gated 136 0 1",
    "late float16 300 712 4 projections 4 150 64",
    "early bfloat16 140 1096 2 projections 3 70 128",
    "late bfloat16 129 2120 2 projections 1 43 256",
    # The same of gradients, whose operands lie the other way: 32 parts, 24 without the product again
    "late bfloat16 1 8 2 gradients 8 0 1",
    "any bfloat16 513 72 2 gradients 264 2 0",
    "early float16 300 328 2 gradients 264 2 1",
    "late bfloat16 129 2120 2 gradients 264 0 1",
    "any float16 140 1608 4 gradients 520 0 0",
]


@pytest.mark.parametrize("case", DECODER)
def test_decoder(programs: Programs, case: str) -> None:
    check(programs.program("decoder"), case)


# Each: when copies happen, dtype, rows, elements of a row, multiprocessors, what the rows are, and the op; norm.cpp says more.
# Rows are many where there are more than four to a multiprocessor.
NORM = [
    # Many rows to a warp, and some past the end
    "any bfloat16 1 8 132 normal layer",
    "any bfloat16 37 24 1 far layer",
    "any float32 37 12 1 equal rms",
    # Rows of several warps: one, or some to a block
    "any bfloat16 3 1000 132 far layer",
    "any bfloat16 9 2048 1 far layer",
    "any bfloat16 9 3000 1 equal layer",
    "any float32 5 2048 1 equal layer",
    "any bfloat16 3 1000 132 normal rms",
    "any bfloat16 9 2048 1 normal rms",
    "any float32 5 1500 1 normal rms",
    "any bfloat16 5 2048 1 normal add",
    "any bfloat16 5 3000 1 normal gated",
    # Weight and bias in shared memory, for two rows; and in global memory
    "early bfloat16 5 4096 1 far layer",
    "late bfloat16 5 4096 1 equal layer",
    "any bfloat16 5 8192 1 far layer",
    "any bfloat16 9 4096 1 normal rms",
    # Longer rows: two and four parts to a thread
    "any bfloat16 5 6144 1 normal rms",
    "any bfloat16 5 12288 1 cached rms",
    # More of them than four times the second cache holds are read twice: two, three and four parts to a thread
    "any bfloat16 5 8192 1 normal rms",
    "any float32 8 2304 1 equal rms",
    "any bfloat16 5 12288 1 normal rms",
    "any float32 5 6656 1 normal rms",
    "any bfloat16 5 16384 1 normal rms",
    # Eight parts to a thread, and rows too long to be held
    "any bfloat16 2 20000 132 equal layer",
    "any bfloat16 2 20000 132 normal rms",
    "any bfloat16 2 33000 132 far layer",
    # Squares that no float holds
    "any bfloat16 4 4096 132 huge layer",
    "any bfloat16 9 1000 1 huge layer",
    "any bfloat16 2 33000 132 normal rms",
    # Not aligned
    "any bfloat16 9 70 1 apart layer",
    "any float32 9 301 1 equal layer",
    "any bfloat16 9 70 1 apart gated",
    # Gradients: rows to a warp, to some warps, to a block; two and three stages of copies
    "late bfloat16 1 8 132 normal layer_backward",
    "late bfloat16 100 24 1 far layer_backward",
    "early bfloat16 5 1000 132 equal layer_backward",
    "late bfloat16 40 512 1 normal layer_backward",
    "late float32 5 2048 132 equal layer_backward",
    "any bfloat16 5 16384 1 normal layer_backward",
    "late bfloat16 40 512 1 far layer_backward",
    "late bfloat16 9 1000 1 normal rms_backward",
    "early bfloat16 9 512 1 normal add_backward",
    "any bfloat16 9 1000 1 normal gated_backward",
    # In two passes: rows not aligned
    "any bfloat16 9 70 1 apart layer_backward",
    "any float32 20 33 132 equal layer_backward",
    "any bfloat16 9 301 1 normal gated_backward",
    # The sums of what the blocks have
    "any bfloat16 1 8 1 normal parts",
    "any float32 70 70 1 normal parts",
]


@pytest.mark.parametrize("case", NORM)
def test_norm(programs: Programs, case: str) -> None:
    check(programs.program("norm"), case)


# Each: dtype, rows, elements of a row, multiprocessors, where the rows lie, the op, and the function; activation.cpp says more.
ACTIVATION = [
    # Few elements
    "bfloat16 3 37 132 dense multiply 0",
    "float32 1 9 132 dense apply_backward 2",
    "bfloat16 5 250 132 halves multiply_backward_result 0",
    "float32 5 250 132 halves multiply 2",
    "bfloat16 5 33 132 halves multiply_backward 1",
    "bfloat16 6 250 132 turned apply 3",
    # Many: one row by blocks of 128 threads, and, where there are very many, of 1024
    "bfloat16 1 131080 1 dense multiply 0",
    "bfloat16 3 5608 1 dense multiply 0",
    "float32 1 5000 1 dense multiply 2",
    "bfloat16 1 5608 1 dense multiply 1",
    "bfloat16 3 1024 1 dense apply 3",
    "float32 3 1024 1 dense apply_backward 1",
    "bfloat16 3 1000 1 dense multiply_backward 2",
    "bfloat16 3 1000 1 dense multiply_backward_result 1",
    # Rows by blocks of their own: of whole blocks, and of some
    "bfloat16 3 2048 1 halves multiply 0",
    "bfloat16 5 720 1 halves multiply 2",
    "float32 4 1440 1 halves multiply_backward 3",
    "bfloat16 3 2048 1 halves multiply_backward_result 0",
    # Rows too short for that, and such as have two strides, by threads that ask where each pack lies
    "bfloat16 40 40 1 halves multiply 1",
    "float32 40 20 1 halves multiply_backward_result 2",
    "bfloat16 6 1024 1 turned multiply_backward 0",
    "bfloat16 9 1024 1 turned apply 2",
    # Not aligned
    "bfloat16 9 301 1 apart multiply 2",
    "float32 9 301 1 apart multiply_backward_result 0",
]


@pytest.mark.parametrize("case", ACTIVATION)
def test_activation(programs: Programs, case: str) -> None:
    check(programs.program("activation"), case)


# Each: the op, dtype, batches, tokens, heads of q and of k, elements of a head, those that are turned, the form, the tables, where q
# and k lie, and multiprocessors; or, of tables, batches, tokens, pairs, the layout and the positions' bits; rotary.cpp says more.
ROTARY = [
    # In the order of memory: powers of 2 and not, some of a head, heads outside, gaps
    "rotate bfloat16 2 5 4 2 64 64 0 own heads 132",
    "rotate bfloat16 2 7 3 1 80 80 0 one heads 1",
    "rotate float32 1 9 2 2 24 24 0 own heads 1",
    "rotate float32 2 3 2 1 16 8 8 paired tokens 1",
    "rotate bfloat16 3 6 5 2 48 32 0 paired parts 1",
    "rotate bfloat16 2 1 4 2 32 32 4 one parts 132",
    "rotate bfloat16 2 7 5 1 32 32 2 own tokens 1",
    "rotate bfloat16 1 70 2 1 16 16 6 one tokens 1",
    "rotate bfloat16 2 5 4 2 64 32 4 own heads 1",
    "rotate bfloat16 1 1 1 0 16 16 0 own heads 132",
    "rotate bfloat16 2 1 4 2 32 32 0 own heads 132",
    "rotate bfloat16 1 3 2 1 16 0 0 own heads 1",
    # Token by token: neighbours, rounded once, tables in float32, not aligned
    "rotate bfloat16 2 5 4 2 32 32 1 own heads 132",
    "rotate bfloat16 2 5 4 2 48 32 7 paired heads 1",
    "rotate bfloat16 2 5 4 2 32 32 8 own tokens 1",
    "rotate bfloat16 2 5 4 2 32 32 10 wide heads 1",
    "rotate float32 2 3 9 2 7 6 4 own odd 1",
    "rotate bfloat16 2 3 5 2 16 16 0 own odd 1",
    "tables bfloat16 2 5 8 0 64 132",
    "tables float32 1 300 8 1 32 1",
    "tables bfloat16 3 70 12 2 64 1",
    "tables float32 2 70 20 0 64 1",
]


# Each: the op, dtype, rows, classes, smoothing and z term in thousandths, where the logits lie, and multiprocessors; loss.cpp says more.
LOSS = [
    "losses bfloat16 4 1000 0 0 dense 1",
    "losses float32 3 5 100 0 odd 1",
    "losses bfloat16 3 4096 100 1 halves 1",
    "both float32 4 260 0 0 dense 1",
    "both bfloat16 4 2056 100 2 halves 1",
    "both bfloat16 4 71 0 0 odd 1",
    "in_place bfloat16 4 1000 0 0 dense 1",
    "in_place float32 3 1004 100 1 dense 1",
    "both bfloat16 2 65800 0 0 dense 1",
    "gradients bfloat16 4 1000 100 1 halves 1",
    "gradients float32 4 4104 0 0 dense 1",
    "gradients bfloat16 5 33 0 2 odd 1",
    "scale bfloat16 3 700 0 0 dense 1",
    "scale float32 5 1003 0 0 dense 1",
    "scale bfloat16 5 33333 0 0 odd 1",
]


@pytest.mark.parametrize("case", LOSS)
def test_loss(programs: Programs, case: str) -> None:
    check(programs.program("loss"), case)


@pytest.mark.parametrize("case", ["gradients bfloat16 7 1000 100 1 halves 1", "both float32 8 5 100 0 odd 1"])
def test_loss_of_more_rows_than_a_launch_has_blocks(programs: Programs, case: str) -> None:
    check(programs.planted("loss", "AT_ONCE = 0x7fffffff;", "AT_ONCE = 3;", "losses"), case)


@pytest.mark.parametrize("case", ROTARY)
def test_rotary(programs: Programs, case: str) -> None:
    check(programs.program("rotary"), case)


@pytest.mark.parametrize(
    ("kernel", "source", "cases"),
    [
        ("decoder", "add", ["any bfloat16 129 328 2 add 264"]),
        ("decoder", "mlp", ["any bfloat16 129 72 2 mlp 136 0 1 264"]),
        ("decoder", "projections", ["any bfloat16 129 72 2 projections 1 60 128"]),
        ("decoder", "gradients", ["any bfloat16 129 328 2 gradients 264 0 1"]),
        (
            "norm",
            "layer",
            ["any bfloat16 5 4096 1 far layer", "any bfloat16 9 2048 1 far layer"],
        ),
        ("norm", "rms_backward", ["any bfloat16 41 512 1 normal rms_backward"]),
        ("norm", "layer_backward", ["any bfloat16 40 512 1 far layer_backward"]),
        ("loss", "losses", ["in_place bfloat16 4 1000 100 1 dense 1"]),
    ],
)
def test_threads_do_not_race(sanitizing: Programs, kernel: str, source: str, cases: list[str]) -> None:
    program = sanitizing.sanitized(kernel, source)
    for case in cases:
        check(program, case)


# What the model is for. All but the last would depend on when threads and copies happen to come.
@pytest.mark.parametrize(
    ("kernel", "source", "old", "new", "case", "said"),
    [
        pytest.param(
            "decoder", "add", "Stage stage{0, 1};\n    copy_tiles(work, tiles,", "Stage stage{0, 0};\n    copy_tiles(work, tiles,",
            "any bfloat16 1 8 2 add 8", "deadlock: ", id="a barrier's parity",
        ),
        pytest.param(
            "decoder", "add", 'begin() const {\n    if (thread == 0) {\n      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");',
            "begin() const {\n    if (thread == 0) {",
            "late bfloat16 1 8 2 add 264", "the largest error", id="no wait before what is written is overwritten",
        ),
        pytest.param(
            "decoder", "add", "          row = (BLOCKS * at.row + work.block) * ROWS + out.group",
            "          row = (BLOCKS * at.row + work.block) * ROWS + 1 + out.group",
            "any bfloat16 8 8 2 add 8", "the largest error", id="a tile's row",
        ),
        pytest.param(
            "decoder", "gradients", "warp_wait(barrier, slab % 2);", "",
            "late bfloat16 1 8 2 gradients 8 0 1", "more arrivals in a phase", id="no wait for what is copied",
        ),
        pytest.param(
            "decoder", "mlp", "wait_until_written(written + row, gated.across);", "",
            "late bfloat16 300 8 4 mlp 136 0 0 264", "the largest error", id="no wait for what others write",
        ),
        pytest.param(
            "decoder", "mlp", "    wait();\n    asm volatile(\"bar.sync", "    asm volatile(\"bar.sync",
            "late bfloat16 300 8 4 mlp 136 0 0 264", "the largest error", id="told before it is written",
        ),
        pytest.param(
            "decoder", "mlp", "          tell_written(written + BLOCKS", "          (written + BLOCKS",
            "any bfloat16 1 8 2 mlp 8 0 0 8", "deadlock: ", id="nobody is told",
        ),
        pytest.param(
            "decoder", "mlp", "    wait();\n    asm volatile(\"bar.sync",
            '    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");\n    asm volatile("bar.sync',
            "late bfloat16 300 8 4 mlp 136 0 0 264", "the largest error", id="told when it is read, not written",
        ),
        pytest.param(
            "decoder", "mlp", "tell_written(written + BLOCKS * place(tile, gated.down, gated.across).row + work.block);", ";",
            "any bfloat16 300 8 4 mlp 136 0 0 264", "deadlock: ", id="no pair is told",
        ),
        pytest.param(
            "decoder", "mlp", "(work.pair + work.pairs - gated.count % work.pairs) % work.pairs", "work.pair",
            "any bfloat16 600 8 4 mlp 264 0 0 8", "steps of a pair", id="who has the first of the others",
        ),
        pytest.param(
            "decoder", "mlp", "  cudaGetLastError(); // this", "  // this",
            "any bfloat16 300 72 10 mlp 136 0 1 264", "is left for whoever asks next", id="an error that is left",
        ),
        pytest.param(
            "decoder", "mlp", "started != cudaErrorCooperativeLaunchTooLarge", "true",
            "any bfloat16 300 72 10 mlp 136 0 1 264", "the launch returned error", id="a launch that is too large",
        ),
        pytest.param(
            "norm", "rms", "unpack(load_hinted<T, V, true>(from, i), of);", "unpack(load_hinted<T, V, true>(from, i ^ 1), of);",
            "any bfloat16 5 8192 1 normal rms", "the largest error", id="what is read again",
        ),
        pytest.param(
            "activation", "elements", "args.to_stride / V, static_cast<unsigned>(rows.columns)", "args.n / V, static_cast<unsigned>(rows.columns)",
            "bfloat16 5 250 132 halves multiply_backward_result 0", "the largest error", id="gradients of halves of few elements",
        ),
        pytest.param(
            "activation", "elements", "blockIdx.x - row * of.across", "blockIdx.x",
            "bfloat16 3 2048 1 halves multiply 0", "the largest error", id="a block's part of its row",
        ),
        pytest.param(
            "activation", "elements", "if (column < of.columns) {", "{",
            "bfloat16 5 720 1 halves multiply 2", "behind the last row", id="threads past a row's end",
        ),
        pytest.param(
            "activation", "elements", "static_cast<int64_t>(row) * of.columns + column", "column",
            "bfloat16 3 2048 1 halves multiply_backward_result 0", "the largest error is nan", id="rows that nothing writes",
        ),
        pytest.param(
            "activation", "elements", "row * of.to_stride + column", "row * of.columns + column",
            "float32 4 1440 1 halves multiply_backward 3", "the largest error", id="gradients of halves",
        ),
        pytest.param(
            "loss", "losses", "of, label - i * V);\n        }\n      }\n    }\n  }\n}\n\nconstexpr", "of, label);\n        }\n      }\n    }\n  }\n}\n\nconstexpr",
            "both bfloat16 4 2056 100 2 halves 1", "the largest error", id="the label's pack",
        ),
        pytest.param(
            "loss", "losses", "total *= exponential<T>(most - found);", "",
            "both bfloat16 2 65800 0 0 dense 1", "the largest error", id="a sum of another largest",
        ),
        pytest.param(
            "loss", "losses", "blockIdx.x == 0 && i < args.n", "false",
            "scale bfloat16 3 700 0 0 dense 1", "the largest error", id="elements after the last pack",
        ),
        pytest.param(
            "loss", "losses", "smooth && first + k * blockDim.x < count", "smooth",
            "both bfloat16 4 2056 100 2 halves 1", "the largest error", id="packs that there are not",
        ),
        pytest.param(
            "loss", "losses", "1.0 + 2.0 * args.z * log_sum", "1.0 + args.z * log_sum",
            "gradients bfloat16 4 1000 100 1 halves 1", "the largest error", id="the z term's slope",
        ),
        pytest.param(
            "rotary", "rotate", "args.paired && !low ? i - half : i;", "i;",
            "rotate bfloat16 3 6 5 2 48 32 0 paired parts 1", "the largest error", id="what both of a pair have",
        ),
        pytest.param(
            "rotary", "rotate", "token = apart.by_heads ? inner : outer;", "token = outer;",
            "rotate bfloat16 2 7 5 1 32 32 2 own tokens 1", "the largest error", id="tokens inside heads",
        ),
        pytest.param(
            "rotary", "rotate", "(31 + bits)) + by - 1) / by)", "(31 + bits))) / by)",
            "rotate bfloat16 2 7 3 1 80 80 0 one heads 1", "the largest error", id="a division that is one short",
        ),
        pytest.param(
            "rotary", "rotate", "turns ? of_word : x.words[word];", "of_word;",
            "rotate bfloat16 2 5 4 2 64 32 4 own heads 1", "the largest error", id="what is not turned",
        ),
        pytest.param(
            "rotary", "rotate", "args.crossed ? here + across : here", "here",
            "rotate bfloat16 2 5 4 2 64 32 4 own heads 1", "the largest error", id="the other half's sine",
        ),
        pytest.param(
            "rotary", "rotate", "if (at >= of.packs) {", "if (false) {",
            "rotate bfloat16 1 63 1 1 16 16 0 own heads 132", "behind the last row", id="threads past the end",
        ),
        pytest.param(
            "decoder", "gradients", "uint64_t(DEPTH * 128 >> 4) << 16", "uint64_t(DEPTH * 64 >> 4) << 16",
            "any bfloat16 1 72 2 gradients 72 0 1", "the largest error", id="where the next columns lie",
        ),
        pytest.param(
            "decoder", "gradients", "127.0f)", "126.0f)",
            "any bfloat16 1 8 2 gradients 8 0 1", "the largest error", id="a power whose inverse is a number",
        ),
    ],
)  # fmt: skip
def test_mistakes_show(programs: Programs, kernel: str, source: str, old: str, new: str, case: str, said: str) -> None:
    check(programs.program(kernel), case)
    program = programs.planted(kernel, old, new, source)
    # Clusters of one launch are processes, and in what order these come the host decides.
    runs = (run(program, case) for _ in range(5))
    done = next((done for done in runs if done.returncode != 0), None)
    assert done is not None, "the mistake does not show"
    assert said in done.stderr


def test_a_sum_in_the_half_that_is_read_shows(sanitizing: Programs) -> None:
    program = sanitizing.planted(
        "norm", "turn ^= 1;\n    });\n    each([&](int k,", "});\n    each([&](int k,", "rms_backward", sanitize=True
    )
    done = run(program, "any bfloat16 41 512 1 normal rms_backward")
    assert done.returncode == RACE, done.stderr[:8000]
    assert "data race" in done.stderr


def test_a_label_that_is_written_over_before_all_have_read_it_shows(sanitizing: Programs) -> None:
    program = sanitizing.planted("loss", "__syncthreads(); // the label's", "// the label's", "losses", sanitize=True)
    done = run(program, "in_place bfloat16 4 1000 100 1 dense 1")
    assert done.returncode == RACE, done.stderr[:8000]
    assert "data race" in done.stderr


def test_a_statement_that_is_not_modelled_is_an_error() -> None:
    source = '// asm volatile("nothing;");\nvoid f(int x) {\n  asm volatile(\n      "prefetch.global.L2 [%0];" ::"l"(x) : "memory");\n}\n'
    with pytest.raises(Unmodelled, match=r"a\.cu:3: .*'prefetch\.global\.L2 \[%0\];'"):
        translated(source, "a.cu")


def test_a_statement_is_what_the_model_does() -> None:
    source = 'int y;\nasm volatile(\n    "ld.shared.b32 %0, [%1];" : "=r"(y) : "r"(place(a, b)) : "memory");\nasm("wgmma.wait_group.sync.aligned 1;" ::: "memory");\n'
    lines = translated(source, "a.cu").splitlines()
    assert lines[:3] == ['#include "model.h"', '#line 1 "a.cu"', "int y;"]
    assert lines[3:] == ["y = model::read_shared(place(a, b))", ";", "model::wait_for_products(1);"]


def test_launches_and_clusters_are_the_models() -> None:
    source = "__global__ void __cluster_dims__(TWO, 1, 1) k(int x) {\n}\nk<<<1, 2, 3, static_cast<S>(d.s)>>>(x);\n"
    assert translated(source, "a.cu").splitlines()[2:] == [
        "__global__ void  k(int x) { model::in_cluster_of(TWO);",
        "}",
        "model::launch(k, 1, 2, 3, static_cast<S>(d.s), x);",
    ]
    for source, form in (("k<<<1, 2>>>;", "<<<"), ('__asm__("nop;");', "__asm__")):
        with pytest.raises(Unmodelled, match=form):
            translated(source, "a.cu")
