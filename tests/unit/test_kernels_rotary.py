"""kernelhub/rotary without compiled ops, and which formula it finds in every function that transformers marks."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from kernelprojects import load_compiled, load_noarch
from torch import Tensor, nn
from transformers.models.esm import modeling_esm as esm
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.nanochat import modeling_nanochat as nanochat
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.phi3 import modeling_phi3 as phi3

import kernelhub
from kernelhub.hub.client import Hub, set_default_hub
from kernelhub.layers.contract import compare
from kernelhub.layers.markers import use_kernel_forward_from_hub
from kernelhub.settings import Settings

rotary = load_noarch("rotary", "_rotary_under_test")
formulas = sys.modules["_rotary_under_test.formulas"]
INTERLEAVED, INVERSE, ROUND_ONCE = formulas.INTERLEAVED, formulas.INVERSE, formulas.ROUND_ONCE
CAST_BACK, PAIRED = formulas.CAST_BACK, formulas.PAIRED

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SOURCES = Path(transformers.__file__).parent

Turn = Callable[..., tuple[Tensor, Tensor]]


def operands(dtype: torch.dtype, tables: torch.dtype | None = None, width: int = 16, table: int = 16) -> list[Tensor]:
    """q, k, cos and sin; the tables' halves are alike, as models have them."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 4, width, generator=generator).to(dtype).transpose(1, 2)
    k = torch.randn(2, 5, 2, width, generator=generator).to(dtype).transpose(1, 2)
    angles = torch.randn(2, 5, table, generator=generator) * 3
    return [q, k, angles.cos().to(tables or dtype), angles.sin().to(tables or dtype)]


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Plain PyTorch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_models_own_formula_bit_for_bit(dtype: torch.dtype) -> None:
    """needs 7: numerics drift."""
    arguments = operands(dtype)
    behind = [x.transpose(1, 2) for x in arguments[:2]] + arguments[2:]
    assert same(rotary.apply_rotary(*arguments), llama.apply_rotary_pos_emb(*arguments))
    assert same(rotary.apply_rotary(*behind, 2), llama.apply_rotary_pos_emb(*behind, 2))
    assert same(rotary.apply_rotary(*arguments, inverse=True), nanochat.apply_rotary_pos_emb(*arguments))
    part = operands(dtype, width=24)
    assert same(rotary.apply_rotary(*part), phi3.apply_rotary_pos_emb(*part))
    pairs = operands(dtype, table=8)
    assert same(rotary.apply_rotary(*pairs, rotary_dim=16), gpt_oss.apply_rotary_pos_emb(*pairs))
    if dtype is not torch.float64:
        assert same(rotary.apply_rotary(*arguments, round_once=True), esm.apply_rotary_pos_emb(*arguments))
        wide = operands(dtype, torch.float32)
        assert same(rotary.apply_rotary(*wide, round_once=True), olmo2.apply_rotary_pos_emb(*wide))
        assert same(rotary.apply_rotary(*wide), llama.apply_rotary_pos_emb(*wide))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interleaved_is_gpt_js(dtype: torch.dtype) -> None:
    q, k, cos, sin = operands(dtype, table=8)
    expected = [gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2) for x in (q, k)]
    assert same(rotary.apply_rotary(q, k, cos, sin, interleaved=True, rotary_dim=16), tuple(expected))


@pytest.mark.parametrize("interleaved", [False, True])
def test_turns_by_the_angle_and_back(interleaved: bool) -> None:
    """In float64, against complex numbers."""
    q, k, _, _ = operands(torch.float64)
    angles = torch.randn(2, 5, 8, dtype=torch.float64)
    options = {"interleaved": interleaved, "rotary_dim": 16}
    turned = rotary.apply_rotary(q, k, angles.cos(), angles.sin(), **options)

    def as_complex(x: Tensor) -> Tensor:
        return torch.complex(x[..., ::2], x[..., 1::2]) if interleaved else torch.complex(*x.chunk(2, dim=-1))

    for x, y in zip((q, k), turned, strict=True):
        torch.testing.assert_close(as_complex(y), as_complex(x) * torch.exp(1j * angles[:, None]))
    back = rotary.apply_rotary(*turned, angles.cos(), angles.sin(), **options, inverse=True)
    torch.testing.assert_close(back, (q, k))


@pytest.mark.parametrize("options", [{}, {"interleaved": True}, {"round_once": True}, {"inverse": True}], ids=str)
def test_gradients_are_those_of_finite_differences(options: dict[str, bool]) -> None:
    arguments = [x[:1, ..., :2, :].clone().requires_grad_() for x in operands(torch.float64, width=10, table=8)]
    function = functools.partial(rotary.apply_rotary, **options)
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_a_rotary_dim_that_cannot_be_is_an_error() -> None:
    arguments = operands(torch.float32)
    for width, message in ((15, "even"), (18, "even"), (12, "half as many")):
        with pytest.raises(ValueError, match=message):
            rotary.apply_rotary(*arguments, rotary_dim=width)


def test_the_layer_without_compiled_ops_is_the_function_itself() -> None:
    function = _marked(esm)
    function.forward = rotary.layers.rotary_pos_emb.forward.__get__(function)
    arguments = operands(torch.bfloat16)
    assert same(function(*arguments), esm.apply_rotary_pos_emb(*arguments))
    assert type(function) not in formulas._known
    alone = rotary.layers.rotary_pos_emb()
    assert same(alone(*arguments), llama.apply_rotary_pos_emb(*arguments))


# The functions of transformers


def _models() -> list[str]:
    """The modules of transformers that mark a function as this layer."""
    found = []
    for path in sorted(SOURCES.glob("models/*/modeling_*.py")):
        if "rotary_pos_emb" in path.read_text():
            functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
            decorators = [ast.unparse(one) for function in functions for one in function.decorator_list]
            if any("'rotary_pos_emb'" in one for one in decorators):
                found.append(f"transformers.models.{path.parent.name}.{path.stem}")
    return found


MODELS = _models()
# All but those of the usual formula.
OTHERS = {
    **dict.fromkeys(("beam", "flex_olmo", "olmo", "olmo2", "olmo3", "olmo_hybrid"), CAST_BACK),
    **dict.fromkeys(("esm", "evolla", "modernbert", "modernbert_decoder", "hunyuan_vl"), ROUND_ONCE | CAST_BACK),
    "gpt_oss": PAIRED,
    "openai_privacy_filter": PAIRED | INTERLEAVED,
    "nanochat": INVERSE,
}


def _marked(module: ModuleType) -> nn.Module:
    """The module's function, kernel-aware, as transformers' decorator makes it where a `kernels` package is installed.

    It may be so already, by the tests of another file, if they ran in this process.
    """
    return use_kernel_forward_from_hub("rotary_pos_emb")(inspect.unwrap(module.apply_rotary_pos_emb))


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("rotary", request.config, "cpu")


def test_transformers_marks_many() -> None:
    assert len(MODELS) > 100
    assert {f"transformers.models.{name}.modeling_{name}" for name in OTHERS} <= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_each_marked_function_is_given_its_own_formula(compiled: ModuleType, name: str) -> None:
    """The layer in its place gives the same bits, and the compiled op computes them wherever the dtypes are the usual ones."""
    function = _marked(importlib.import_module(name))
    model = name.split(".")[2]
    kernel = compiled.layers.rotary_pos_emb
    assert compare(kernel, kernel.forward, type(function)).problems == ()
    assert compiled.formulas.of(type(function)) == OTHERS.get(model, 0)
    table = 8 if OTHERS.get(model, 0) & PAIRED else 16
    for dtype, tables in itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=2):
        arguments = operands(dtype, tables, table=table)
        behind = [x.transpose(1, 2) for x in arguments[:2]] + arguments[2:]
        for given in ((*arguments,), (*behind, 2), (*arguments, -3)):
            expected = type(function).forward(*given)
            with counted(compiled) as calls:
                got = kernel.forward(function, *given)
            assert same(got, expected), (dtype, tables)
            once = tables == torch.float32 and OTHERS.get(model, 0) & (CAST_BACK | ROUND_ONCE)
            assert len(calls) == (1 if dtype == tables or once else 0), (dtype, tables)


class counted:
    """Counts the calls of the compiled op."""

    def __init__(self, kernel: ModuleType) -> None:
        self.module, self.op, self.calls = kernel.compiled, kernel.compiled._rotate, []

    def __enter__(self) -> list[int]:
        def op(*arguments: object) -> tuple[Tensor, Tensor]:
            self.calls.append(1)
            return self.op(*arguments)

        self.module._rotate = op
        return self.calls

    def __exit__(self, *_: object) -> None:
        self.module._rotate = self.op


def _scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    q, k = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    return q * 2, k


def _always_before(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    return llama.apply_rotary_pos_emb(q, k, cos, sin) if unsqueeze_dim else (q, k)


def _list(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> list[Tensor]:
    return list(llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim))


def _q_only(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)[0], k


@pytest.mark.parametrize("function", [_scaled, _always_before, _list, _q_only], ids=lambda function: function.__name__)
def test_a_formula_that_is_not_known_runs_itself(compiled: ModuleType, function: Turn) -> None:
    marked = use_kernel_forward_from_hub("rotary_pos_emb")(function)
    assert compiled.formulas.of(type(marked)) == compiled.formulas.UNKNOWN
    arguments = operands(torch.float32)
    got = compiled.layers.rotary_pos_emb.forward(marked, *arguments)
    assert type(got) is type(function(*arguments))
    assert same(tuple(got), tuple(function(*arguments)))


def test_a_call_that_the_formula_does_not_cover_is_the_functions(compiled: ModuleType) -> None:
    """Tables that broadcast, dtypes that promote, gradients of the tables, and errors."""
    function = _marked(llama)
    forward = functools.partial(compiled.layers.rotary_pos_emb.forward, function)
    q, k, cos, sin = operands(torch.float32)
    others = [(q, k, cos[:, :1], sin[:, :1]), (q, k, cos[..., :1], sin[..., :1]), (q, k.half(), cos, sin)]
    for arguments in others:
        assert same(forward(*arguments), llama.apply_rotary_pos_emb(*arguments))
    cos.requires_grad_()
    sum(x.sum() for x in forward(q, k, cos, sin)).backward()
    assert cos.grad is not None
    cos = cos.detach()
    with pytest.raises(RuntimeError, match="must match"):
        forward(q, torch.cat((k, k), dim=-1), cos, sin)
    with pytest.raises(RuntimeError, match="must match"):
        forward(q, k, cos[..., :8], sin[..., :8])  # half as wide, which the op would take, and the function does not


class Module(nn.Module):
    """A marked function as other packages make it one: its forward takes the module, too."""

    def forward(self, *arguments: object, **named: object) -> tuple[Tensor, Tensor]:
        return nanochat.apply_rotary_pos_emb(*arguments, **named)


class Stateful(nn.Module):
    """A module of its own, whose forward reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        q, k = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        return q * self.scale, k


@pytest.mark.parametrize(("cls", "formula"), [(Module, INVERSE), (Stateful, -1)])
def test_modules_with_a_forward_of_their_own(compiled: ModuleType, cls: type[nn.Module], formula: int) -> None:
    module, arguments = cls(), operands(torch.float32)
    assert compiled.formulas.of(cls) == formula
    expected = module(*arguments)
    module.forward = compiled.layers.rotary_pos_emb.forward.__get__(module)
    assert same(module(*arguments), expected)


def test_a_function_is_asked_once(compiled: ModuleType) -> None:
    calls = []

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        calls.append(q.shape)
        return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

    marked = use_kernel_forward_from_hub("rotary_pos_emb")(function)
    arguments = operands(torch.float32)
    compiled.layers.rotary_pos_emb.forward(marked, *arguments)
    asked = len(calls)
    assert arguments[0].shape not in calls
    compiled.layers.rotary_pos_emb.forward(marked, *arguments)
    assert len(calls) == asked > 0


def test_comes_from_the_embedded_hub(tmp_path: Path) -> None:
    """What the tests above read from the folder is what users get by name."""
    set_default_hub(Hub(settings=Settings(cache=tmp_path, offline=True, build="never")))
    try:
        kernel = kernelhub.get_kernel("kernelhub/rotary", version=1)
    finally:
        set_default_hub(None)
    assert kernel.__all__ == rotary.__all__
    assert kernel.layers.__all__ == rotary.layers.__all__
    arguments = operands(torch.float32)
    assert same(kernel.apply_rotary(*arguments), rotary.apply_rotary(*arguments))


def test_the_layer_has_nothing_but_what_the_contract_allows() -> None:
    layer = rotary.layers.rotary_pos_emb
    members = {member for member in vars(layer) if not (member.startswith("__") and member.endswith("__"))}
    assert members == {"forward", "can_torch_compile", "has_backward"}
    assert layer.can_torch_compile is layer.has_backward is True
