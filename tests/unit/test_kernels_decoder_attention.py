"""kernelhub/decoder's attention: against float64, what it keeps and calls, and when the class's forward runs instead."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType, ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernelprojects import load_compiled
from test_kernels_decoder import DTYPES, HOOKS, Named, assert_as_near, joined, kept, values
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, Ernie4_5Config, LlamaConfig, MistralConfig, Qwen2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.ernie4_5 import modeling_ernie4_5
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from kernelhub.integrations.rotary import aware

HIDDEN = 48
TOKENS = 7
LAYERS = {"RotaryAttention": LlamaAttention, "WindowedRotaryAttention": MistralAttention}


@pytest.fixture(scope="session")
def decoder(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("decoder", request.config)


@pytest.fixture(params=["compiled", "pytorch"])
def way(request: pytest.FixtureRequest, decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled op of the rotary kernel, and without."""
    rotary = decoder.attention.rotary
    assert rotary.compiled.HERE
    if request.param == "pytorch":
        monkeypatch.setattr(rotary.compiled, "takes", lambda *_: False)
    return request.param


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    """Which attention, and of which shape."""

    cls: type = LlamaAttention
    config: type = LlamaConfig
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    bias: bool = False
    batches: int = 1  # that the tables are for
    implementation: str = "sdpa"


class Attention(nn.Module):
    """An attention with its tables, and nothing but a tensor as its argument and its result."""

    def __init__(self, attention: nn.Module, cos: Tensor, sin: Tensor, **options: Any) -> None:
        super().__init__()
        self.attention, self.tables, self.options = attention, (cos, sin), options

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = (table[:, : x.shape[1]].to(x.dtype) for table in self.tables)
        return self.attention(x, position_embeddings=(cos, sin), attention_mask=None, **self.options)[0]


def made(case: Case = Case(), dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> Attention:  # noqa: B008
    torch.manual_seed(0)
    options = {"hidden_size": HIDDEN, "num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads}
    config = case.config(**options, head_dim=case.head_dim, attention_bias=case.bias)
    config.layer_types = ["full_attention"]
    config._attn_implementation = case.implementation
    attention = case.cls(config, 0).to(dtype)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    angles = values(case.batches, tokens, case.head_dim, seed=5)
    return Attention(attention, angles.cos().to(dtype), angles.sin().to(dtype))


def with_kernel(decoder: ModuleType, original: Attention) -> Attention:
    """A copy that runs the kernel."""
    kernelized = copy.deepcopy(original)
    inner = kernelized.attention
    name = next(name for name, cls in LAYERS.items() if (cls is LlamaAttention) is not ("sliding" in code_of(inner)))
    inner.forward = getattr(decoder.layers, name).forward.__get__(inner)
    return kernelized


def code_of(module: nn.Module) -> str:
    code = type(module).forward.__code__
    return str((code.co_names, code.co_consts))


def pair(decoder: ModuleType, *how: Any, **options: Any) -> tuple[Attention, Attention]:
    original = made(*how, **options)
    return original, with_kernel(decoder, original)


def step(module: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    out = module(x)
    out.backward(values(*out.shape, dtype=out.dtype, seed=9))
    found = {"result": out.detach(), "input": x.grad}
    for name, parameter in module.named_parameters():
        found[name] = parameter.grad
        parameter.grad = None
    return found


def in_float64(module: Attention) -> Attention:
    exact = copy.deepcopy(module).double()
    exact.tables = tuple(table.double() for table in module.tables)
    return exact


@pytest.fixture
def calls(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each attention that has a backward of its own from now on."""
    found, function = [], decoder.attention._Projections.apply
    monkeypatch.setattr(decoder.attention._Projections, "apply", lambda *a: (found.append("own"), function(*a))[1])
    return found


def assert_close(
    got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


# Numbers

CASES = [
    Case(),
    Case(heads=2, kv_heads=1, head_dim=64, bias=True),
    Case(heads=3, kv_heads=3, head_dim=128, batches=2),
    Case(MistralAttention, MistralConfig, kv_heads=1),
    Case(Qwen2Attention, Qwen2Config, batches=2),
    Case(implementation="eager"),
]


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, dtype) for case in CASES[:3] for dtype in DTYPES), *((case, DTYPES[1]) for case in CASES[3:])]
)  # fmt: skip
@pytest.mark.usefixtures("way")
def test_result_and_gradients_are_as_near_to_float64_as_the_models_own(
    decoder: ModuleType, case: Case, dtype: torch.dtype, calls: list[str]
) -> None:
    original, kernelized = pair(decoder, case, dtype)
    x = values(2, TOKENS, HIDDEN, dtype=dtype)
    exact = step(in_float64(original), x.double())
    if dtype is torch.float64:
        assert_close(step(kernelized, x), exact, rtol=1e-12, atol=1e-12)
    else:
        assert_as_near(step(kernelized, x), step(original, x), exact)
    assert calls == ["own"]
    with torch.no_grad():
        assert torch.equal(kernelized(x), original(x))
    assert calls == ["own"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("way")
def test_in_float32_the_result_has_the_bits_of_the_classs_forward(
    decoder: ModuleType, case: Case, calls: list[str]
) -> None:
    original, kernelized = pair(decoder, case)
    x = values(2, TOKENS, HIDDEN)
    for module in (original, kernelized):
        module.attention.attention_dropout = 0.5
    for training in (False, True):
        results = []
        for module in (original.train(training), kernelized.train(training)):
            torch.manual_seed(1)
            results.append(module(x))
        assert torch.equal(*results), training
        assert results[1].requires_grad
    assert len(calls) == 2


@pytest.mark.usefixtures("way")
def test_whatever_needs_a_gradient_gets_it(decoder: ModuleType) -> None:
    """Each operand alone, each pair, and all of them: those gradients, and no other."""
    head_dim = 4
    shapes = [(2, 3, 6), (8, 6), (8,), (4, 6), (4,), (4, 6), (4,)]
    operands = [values(*shape, dtype=torch.float64, seed=seed) for seed, shape in enumerate(shapes)]
    cos, sin = (values(1, 3, head_dim, dtype=torch.float64, seed=seed) for seed in (11, 12))

    def formula(x: Tensor, *w: Tensor) -> list[Tensor]:
        q, k, v = (F.linear(x, *w[at : at + 2]).unflatten(-1, (-1, head_dim)) for at in (0, 2, 4))
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        return [of.flatten(-2) for of in (q, k, v)]

    ours = partial(decoder.attention._Projections.apply, head_dim)
    seeds = [values(2, 3, wide, dtype=torch.float64, seed=20 + wide) for wide in (8, 4, 4)]
    leaves = [of.clone().requires_grad_() for of in operands]
    wanted = torch.autograd.grad(formula(*leaves), leaves, seeds)
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(7), n) for n in (1, 2, 7)):
        leaves = [of.clone().requires_grad_(at in chosen) for at, of in enumerate(operands)]
        torch.autograd.backward(ours(*leaves, cos, sin), seeds)
        for at, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (at in chosen)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, wanted[at])


@pytest.mark.usefixtures("way")
def test_results_that_nothing_depends_on_have_no_part_in_the_gradients(decoder: ModuleType) -> None:
    original = made()
    inner, (cos, sin) = original.attention, original.tables
    x = values(2, TOKENS, HIDDEN).requires_grad_()
    q, k, v = decoder.attention._Projections.apply(
        8, x, inner.q_proj.weight, None, inner.k_proj.weight, None, inner.v_proj.weight, None, cos, sin
    )
    got = torch.autograd.grad(v.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad(inner.v_proj(x).sum(), x)[0])
    (none,) = torch.autograd.grad(v.sum(), inner.q_proj.weight)
    assert not none.any()


def test_what_is_kept_is_the_input_and_what_the_attention_keeps(decoder: ModuleType) -> None:
    original, kernelized = pair(decoder)
    x = values(2, TOKENS, HIDDEN).requires_grad_()
    own = {of.data_ptr() for of in (*kernelized.parameters(), *kernelized.tables, x)}
    tables = {tuple(table.shape) for table in kernelized.tables}
    mine = [tuple(of.shape) for of in kept(lambda: kernelized(x)) if of.data_ptr() not in own]
    theirs = [tuple(of.shape) for of in kept(lambda: original(x)) if of.data_ptr() not in own]
    assert len(mine) == 6, "q, k, v, the result, and what PyTorch's attention keeps of its own"
    assert set(mine) <= set(theirs)
    for parameter in kernelized.parameters():
        parameter.requires_grad_(False)
    frozen = values(2, TOKENS, HIDDEN).requires_grad_()
    assert frozen.data_ptr() not in {of.data_ptr() for of in kept(lambda: kernelized(frozen))}
    assert tables


def test_no_gradient_is_added_in_a_pass_of_its_own(decoder: ModuleType) -> None:
    original, kernelized = pair(decoder)
    x = values(2, TOKENS, HIDDEN).requires_grad_()
    inside = (x * 1).tanh()  # noqa: RUF100
    assert joined(kernelized(inside)) == {}
    assert "TanhBackward0" in joined(original((x * 1).tanh()))
