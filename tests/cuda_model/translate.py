"""CUDA sources as C++ for model.h: what the language adds to C++, and each PTX statement by what it does in the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

# The statement, with spaces for line ends, and the model's: %0 is the first operand, <n> a number in the statement. Where the
# model has nothing for it, see what model.h says of that.
_ACCUMULATORS = ", ".join(f"%{i}" for i in range(128))
STATEMENTS = {
    # Threads
    "bar.sync %0, %1;": "model::named_barrier(%0, %1);",
    "mov.u32 %0, %%cluster_ctarank;": "%0 = model::block_in_cluster();",
    "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;": "model::cluster_barrier();",
    "barrier.cluster.arrive; barrier.cluster.wait;": "model::cluster_barrier();",
    "setmaxnreg.dec.sync.aligned.u32 <n>;": "",
    "setmaxnreg.inc.sync.aligned.u32 <n>;": "",
    "griddepcontrol.wait;": "",
    # mbarriers
    "mbarrier.init.shared::cta.b64 [%0], %1;": "model::barrier_init(%0, %1);",
    "fence.mbarrier_init.release.cluster;": "",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;": "model::barrier_expect(%0, %1);",
    "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra READY; bra AGAIN; READY: }": (
        "model::barrier_wait(%0, %1);"
    ),
    "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.b32 %0, 1, 0, done; }": (
        "%0 = model::barrier_wait(%1, %2);"
    ),
    "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }": (
        "model::barrier_arrive(model::address_in(%0, %1));"
    ),
    # Memory
    "st.shared.b32 [%0], %1;": "model::write_shared(%0, %1);",
    "ld.shared.b32 %0, [%1];": "%0 = model::read_shared(%1);",
    "ld.global.nc.b32 %0, [%1];": "%0 = *(%1);",
    **{
        f"{{ .reg .b64 policy; createpolicy.fractional.L2::evict_{how}.b64 policy, 1.0;"
        f" ld.global.L1::evict_{how}.L2::cache_hint.v4.b32 {{%0, %1, %2, %3}}, [%4], policy; }}": (
            "%0 = (%4)->x, %1 = (%4)->y, %2 = (%4)->z, %3 = (%4)->w;"
        )
        for how in ("first", "last")
    },
    "fence.proxy.async.shared::cta;": "",
    "fence.proxy.async.global; red.release.gpu.global.add.s32 [%0], 1;": "model::count(%0);",
    "{ .reg .pred done; .reg .b32 found; AGAIN: ld.acquire.gpu.global.b32 found, [%0]; setp.ge.s32 done, found, %1;"
    " @done bra READY; nanosleep.u32 100; bra AGAIN; READY: fence.proxy.async.global; }": "model::wait_for_count(%0, %1);",
    # A thread's copies
    "cp.async.ca.shared.global [%0], [%1], 16;": "model::copy_16(%0, %1);",
    "cp.async.cg.shared.global [%0], [%1], 16;": "model::copy_16(%0, %1);",
    "cp.async.commit_group;": "model::commit_copies();",
    "cp.async.wait_group %0;": "model::wait_for_copies(%0);",
    "cp.async.wait_all;": "model::wait_for_all_copies();",
    # The copy engine's
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];": (
        "model::load_tile(%0, %1, %2, %3, %4);"
    ),
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
    " [%0], [%1, {%2, %3}], [%4], %5;": "model::load_tile(%0, %1, %2, %3, %4, %5);",
    "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];": "model::store_tile(%0, %1, %2, %3);",
    "cp.async.bulk.commit_group;": "model::commit_stores();",
    "cp.async.bulk.wait_group.read <n>;": "model::wait_for_stores_read(<n>);",
    "cp.async.bulk.wait_group <n>;": "model::wait_for_stores(<n>);",
    # The tensor cores; TYPE and TURN are parameters of the macro around it
    "{ .reg .pred adds; setp.ne.b32 adds, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.TYPE.TYPE"
    " {" + _ACCUMULATORS + "}, %128, %129, adds, 1, 1, 0, TURN; }": (
        "model::multiply(TYPE, TURN, d, rows, columns, adds)"
    ),
    "wgmma.fence.sync.aligned;": "",
    "wgmma.commit_group.sync.aligned;": "model::commit_products();",
    "wgmma.wait_group.sync.aligned <n>;": "model::wait_for_products(<n>);",
    # Numbers
    "ex2.approx.ftz.f32 %0, %1;": "%0 = model::flushed(std::exp2(%1));",
    "rcp.approx.ftz.f32 %0, %1;": "%0 = model::flushed(1.0f / (%1));",
    # The end
    "trap;": 'model::fail("trap")',
    # What only the compiler sees
    "": "",
    "{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }": (
        "%0 = model::float_of_half(%2), %1 = model::float_of_half((%2) >> 16);"
    ),
    "shl.b32 %0, %2, 16; and.b32 %1, %2, 0xffff0000;": "%0 = (%2) << 16, %1 = (%2) & 0xffff0000u;",
}

_STRING = r'"(?:[^"\\]|\\.)*"'
_COMMENT = re.compile(rf"({_STRING})|//[^\n]*")
_ASM = re.compile(r"\basm\b\s*(?:volatile\s*)?\(")


class Unmodelled(Exception):
    """A source has something that the model would silently not run."""


def translated(source: str, path: str) -> str:
    """The source as C++, with its own line numbers."""
    source = _COMMENT.sub(lambda match: match[1] or "", source)
    done, at = "", 0
    for match in _ASM.finditer(source):
        end = _closing(source, match.end())
        line = source.count("\n", 0, match.start()) + 1
        template, *operands = _parts(source[match.end() : end])
        # Where the model's is empty the semicolon behind the statement stays, and is one.
        done += source[at : match.start()] + _model_of(template, operands, f"{path}:{line}").removesuffix(";")
        at = end + 1
        done += "".join(re.findall(r"\\?\n", source[match.start() : at]))
    return f'#include "model.h"\n#line 1 "{path}"\n' + _language(done + source[at:], path)


def translate_all(sources: Path, to: Path, changed: Callable[[str], str] = lambda text: text) -> None:
    """A folder's sources into another: `a.cu` as `a.cpp`, headers under their names. What needs torch is left out."""
    for path in sorted(sources.iterdir()):
        text = path.read_text()
        if path.suffix in (".cu", ".cuh", ".h") and "#include <torch/" not in text:
            name = f"{path.stem}.cpp" if path.suffix == ".cu" else path.name
            (to / name).write_text(translated(changed(text), str(path)))


def _language(source: str, path: str) -> str:
    source = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = static_cast<\1*>(model::shared_memory());", source
    )
    source = re.sub(r"(\w+)<<<([^;]*?)>>>\(([^;]*?)\);", r"model::launch(\1, \2, \3);", source)
    source = re.sub(r"__cluster_dims__\((\w+), 1, 1\)([^{]*\{)", r"\2 model::in_cluster_of(\1);", source)
    if left := re.search(r"<<<|\b(__cluster_dims__|extern __shared__|asm|__asm__|__asm)\b", source):
        raise Unmodelled(f"{path}: translate.py does not know this form of {left[0]}")
    return source


def _model_of(template: str, operands: list[str], where: str) -> str:
    # A template may have a macro's parameter between its strings.
    pieces = re.findall(rf"{_STRING}|\w+", template.replace("\\\n", " "))
    text = "".join(piece[1:-1].replace("\\n", " ") if piece.startswith('"') else piece for piece in pieces)
    text = " ".join(text.split())
    expressions = [_expression(operand) for part in operands[:2] for operand in _split(part, ",") if operand.strip()]
    for statement, model in STATEMENTS.items():
        match = re.fullmatch(re.escape(statement).replace("<n>", r"(\d+)"), text)
        if match:
            model = model.replace("<n>", match[1] if match.groups() else "")
            return re.sub(r"%(\d+)", lambda number: expressions[int(number[1])], model)
    raise Unmodelled(
        f"{where}: the model has nothing for the PTX statement {text!r}: say in STATEMENTS of "
        "tests/cuda_model/translate.py what it does, and have model.cpp do it"
    )


def _parts(statement: str) -> list[str]:
    """Of what is in an asm's parentheses: the template, the results, the operands and what else is written to."""
    return _split(statement, ":")


def _expression(operand: str) -> str:
    """`"=r"(x)` is x; what a macro stands for is itself."""
    match = re.fullmatch(r'\s*"[^"]*"\s*\((.*)\)\s*', operand, re.DOTALL)
    return match[1] if match else operand.strip()


def _split(text: str, separator: str) -> list[str]:
    """Split where the separator is in no parentheses and no string."""
    parts, depth = [""], 0
    for token in re.findall(rf"{_STRING}|.", text, re.DOTALL):
        depth += (token in "([{") - (token in ")]}") if len(token) == 1 else 0
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _closing(text: str, start: int) -> int:
    """Where the parenthesis is closed that was opened before `start`."""
    depth = 1
    for token in re.finditer(rf"{_STRING}|[()]", text[start:]):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0:
            return start + token.start()
    raise Unmodelled("an asm statement that does not end")
