"""kernelhub/decoder's attention: against float64, what it keeps and calls, and when the class's forward runs instead."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernelprojects import load_compiled
from test_kernels_decoder import DTYPES, HOOKS, Named, assert_as_near, joined, kept, sums_of_a_compiled, values
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, Ernie4_5Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.ernie4_5 import modeling_ernie4_5
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm

from kernelhub.integrations.rotary import aware

HIDDEN = 48
TOKENS = 7
LAYERS = {
    "RotaryAttention": LlamaAttention,
    "WindowedRotaryAttention": MistralAttention,
    "NormedRotaryAttention": Qwen3Attention,
}


@pytest.fixture(scope="session")
def decoder(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("decoder", request.config, "cpu")


@pytest.fixture(params=["compiled", "pytorch"])
def way(request: pytest.FixtureRequest, decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled op of the rotary kernel, and without."""
    rotary = decoder.attention.rotary
    assert rotary.compiled.HERE
    if request.param == "pytorch":
        monkeypatch.setattr(rotary.compiled, "takes", lambda *_: False)
    return request.param


@pytest.fixture(autouse=True)
def as_on_a_gpu(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], bool]:
    """The backward that on a CPU gains nothing. The fixture is what there is without it."""
    found = decoder.attention._has_backward
    monkeypatch.setattr(decoder.attention, "_has_backward", lambda _: torch.is_grad_enabled())
    return found


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


PLAIN = Case()


def made(case: Case = PLAIN, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> Attention:
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
    said = tuple(word for word in ("sliding", "q_norm") if word in code_of(inner))
    names = {
        (): "RotaryAttention",
        ("sliding",): "WindowedRotaryAttention",
        ("sliding", "q_norm"): "NormedRotaryAttention",
    }
    name = names[said]
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


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
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
    Case(Qwen3Attention, Qwen3Config, bias=True, batches=2),
]
NORMED = Case(Qwen3Attention, Qwen3Config, kv_heads=1)


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, dtype) for case in (*CASES[:3], NORMED) for dtype in DTYPES), *((case, DTYPES[1]) for case in CASES[3:])]
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

    ours = functools.partial(decoder.attention._Projections.apply, head_dim)
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
    *_, v = decoder.attention._Projections.apply(
        8, x, inner.q_proj.weight, None, inner.k_proj.weight, None, inner.v_proj.weight, None, cos, sin
    )
    got = torch.autograd.grad(v.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad(inner.v_proj(x).sum(), x)[0])
    (none,) = torch.autograd.grad(v.sum(), inner.q_proj.weight)
    assert not none.any()


def test_what_is_kept_is_the_input_and_what_the_attention_keeps(decoder: ModuleType) -> None:
    _, kernelized = pair(decoder)
    x = values(2, TOKENS, HIDDEN).requires_grad_()
    own = {of.data_ptr() for of in (*kernelized.parameters(), *kernelized.tables, x)}
    found = kept(lambda: kernelized(x))
    assert x.data_ptr() in {of.data_ptr() for of in found}
    # q and the result, k and v, and the sums of PyTorch's attention.
    heads = [(2, 2, TOKENS, 8), (2, 2, TOKENS, 8), (2, 4, TOKENS), (2, 4, TOKENS, 8), (2, 4, TOKENS, 8)]
    assert sorted(tuple(of.shape) for of in found if of.data_ptr() not in own) == heads
    for parameter in kernelized.parameters():
        parameter.requires_grad_(False)
    assert x.data_ptr() not in {of.data_ptr() for of in kept(lambda: kernelized(x))}, "the weights are frozen"


def test_weights_that_are_written_to_between_forward_and_backward(decoder: ModuleType) -> None:
    """An error where they are needed; not where the input needs no gradient, as with PyTorch's own."""
    for module in pair(decoder):
        for needed in (True, False):
            out = module(values(2, TOKENS, HIDDEN).requires_grad_(needed)).sum()
            with torch.no_grad():
                module.attention.q_proj.weight.mul_(1.0)
            if needed:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    out.backward()
            else:
                out.backward()


def test_no_gradient_is_added_in_a_pass_of_its_own(decoder: ModuleType) -> None:
    for case in (PLAIN, NORMED):
        original, kernelized = pair(decoder, case)
        x = values(2, TOKENS, HIDDEN).requires_grad_()
        within = {"ViewBackward0": 2} if case is NORMED else {}  # PyTorch's norms of q and k
        assert joined(kernelized(x.tanh())) == within
        assert "TanhBackward0" in joined(original(x.tanh()))


# With a cache, and all that the attention is given


@pytest.mark.parametrize("case", [Case(), Case(MistralAttention, MistralConfig), Case(implementation="eager"), NORMED])
def test_with_a_cache_it_gives_what_the_classs_forward_gives(decoder: ModuleType, case: Case, calls: list[str]) -> None:
    """A prompt, and then tokens one by one; with gradients and without."""
    for enabled in (True, False):
        results = []
        for module in pair(decoder, case, tokens=TOKENS + 3):
            cache = DynamicCache(config=module.attention.config)
            cos, sin = module.tables
            found = []
            with torch.set_grad_enabled(enabled):
                for first, last in ((0, TOKENS), *((at, at + 1) for at in range(TOKENS, TOKENS + 3))):
                    tables = cos[:, first:last], sin[:, first:last]
                    x = values(2, last - first, HIDDEN, seed=first)
                    found += module.attention(x, tables, attention_mask=None, past_key_values=cache)[:1]
            results.append([*found, cache.layers[0].keys, cache.layers[0].values])
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)
    assert len(calls) == 4


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What attentions of the implementation "asked" are called with."""
    found: list[tuple[Any, ...]] = []

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, str]:
        found.append((q.detach(), k.detach(), v.detach(), mask, options))
        return q.transpose(1, 2) * 2, "weights"

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "asked", attention)
    return found


CASES_ASKED = [
    Case(implementation="asked"),
    Case(MistralAttention, MistralConfig, implementation="asked"),
    Case(Qwen2Attention, Qwen2Config, implementation="asked"),
    Case(Qwen3Attention, Qwen3Config, implementation="asked"),
]


@pytest.mark.parametrize("case", CASES_ASKED)
@pytest.mark.parametrize("training", [False, True])
def test_the_attention_is_called_as_the_classs_forward_calls_it(
    decoder: ModuleType, asked: list[tuple[Any, ...]], case: Case, training: bool, calls: list[str]
) -> None:
    results = []
    for module in pair(decoder, case):
        inner = module.train(training).attention
        inner.attention_dropout, inner.config.sliding_window = 0.25, 3
        if case.cls in (Qwen2Attention, Qwen3Attention):
            inner.sliding_window = 4
        results.append(inner(values(2, TOKENS, HIDDEN), module.tables, "mask", None, position_ids=5, use_cache=False))
    (*theirs, mask, options), (*ours, our_mask, our_options) = asked
    assert mask == our_mask == "mask"
    own = {"sliding_window": 4}
    window = {LlamaAttention: {}, MistralAttention: {"sliding_window": 3}, Qwen2Attention: own, Qwen3Attention: own}
    expected = {"dropout": 0.25 * training, "scaling": 8**-0.5, "position_ids": 5, "use_cache": False}
    assert options == our_options == expected | window[case.cls]
    for got, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(got, wanted)
        assert got.stride() == wanted.stride()
    assert torch.equal(results[1][0], results[0][0])
    assert results[1][1] == results[0][1] == "weights"
    assert len(calls) == 1


def test_a_window_that_is_given_too_is_the_error_that_it_is_for_the_class(
    decoder: ModuleType, asked: list[tuple[Any, ...]]
) -> None:
    for module in pair(decoder, CASES_ASKED[1]):
        with pytest.raises(TypeError, match="multiple values for keyword argument 'sliding_window'"):
            module.attention(values(2, TOKENS, HIDDEN), module.tables, None, sliding_window=3)
    assert asked == []


def test_the_functions_of_the_classs_own_module_are_called(
    decoder: ModuleType, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up in every call, as a global is."""
    both = pair(decoder, Case(implementation="eager"))
    eager = modeling_llama.eager_attention_forward
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", lambda *a, **o: (2 * eager(*a, **o)[0], None))
        found = [module(values(2, TOKENS, HIDDEN)) for module in both]
    assert torch.equal(*found)
    assert not torch.equal(found[1], both[1](values(2, TOKENS, HIDDEN)))
    assert len(calls) == 2


def test_on_a_cpu_the_classs_forward_runs(
    decoder: ModuleType,
    calls: list[str],
    as_on_a_gpu: Callable[[Tensor], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, kernelized = pair(decoder)
    monkeypatch.setattr(decoder.attention, "_has_backward", as_on_a_gpu)
    x = values(2, TOKENS, HIDDEN)
    assert_close(step(kernelized, x), step(original, x), rtol=0, atol=0)
    assert calls == []


def test_without_gradients_and_ops_nothing_is_looked_for(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a token at a time is decoded."""
    original, kernelized = pair(decoder)
    monkeypatch.setattr(decoder.attention, "attention_linears", lambda _: pytest.fail("the weights are looked for"))
    with torch.no_grad():
        assert torch.equal(kernelized(values(2, 1, HIDDEN)), original(values(2, 1, HIDDEN)))


# The rotary embedding


def test_another_formula_runs_in_the_classs_forward(decoder: ModuleType, calls: list[str]) -> None:
    """The same code around another function."""
    case = Case(modeling_ernie4_5.Ernie4_5Attention, Ernie4_5Config)
    original, kernelized = pair(decoder, case)
    x = values(2, TOKENS, HIDDEN)
    assert_close(step(kernelized, x), step(original, x), rtol=0, atol=0)
    assert calls == []


def doubled(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def of(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        q, k = function(q, k, cos, sin, unsqueeze_dim)
        return 2 * q, k

    return of


def wrapped(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    return functools.wraps(function)(doubled(function))


class Turns(nn.Module):
    """A module that is called as the function is."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q + cos.unsqueeze(1), k - sin.unsqueeze(1)


def original_rotary() -> Callable[..., tuple[Tensor, Tensor]]:
    found: Any = modeling_llama.apply_rotary_pos_emb
    return type(found).forward if isinstance(found, nn.Module) else found


@pytest.mark.parametrize("other", [doubled, wrapped, lambda _: Turns()], ids=["function", "wrapped", "module"])
def test_what_somebody_put_in_the_rotary_embeddings_place_is_called(
    decoder: ModuleType, other: Callable[..., Any], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both, x = pair(decoder), values(2, TOKENS, HIDDEN)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", original_rotary())
    before = both[1](x)
    assert len(calls) == 1
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other(original_rotary()))
    found, expected = (step(module, x) for module in both)
    assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found["result"], before)
    assert len(calls) == 1


def test_a_function_of_somebodys_is_called_also_where_it_computes_the_same(
    decoder: ModuleType, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, kernelized), original = pair(decoder), original_rotary()
    x, heard = values(2, TOKENS, HIDDEN), []

    def counted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        heard.append(q.shape[-1])
        return original(q, k, cos, sin, unsqueeze_dim)

    class Counted(nn.Module):
        forward = staticmethod(counted)

    for other in (counted, Counted()):
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
        kernelized(x)
        assert heard == [8], "it is called, and not asked for its formula"
        heard.clear()
    assert calls == []


@pytest.fixture
def rotary(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Llama's rotary embedding, kernel-aware, and as it is afterwards."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", original_rotary())
    found = aware(modeling_llama.__name__)
    before = dict(found.__dict__)
    yield found
    found.__dict__.clear()
    found.__dict__.update(before)


def test_the_kernel_aware_rotary_embedding_is_passed_by(
    decoder: ModuleType, rotary: nn.Module, calls: list[str]
) -> None:
    """By itself and with our kernel; with a forward of others and with hooks it is called."""
    both, x = pair(decoder), values(2, TOKENS, HIDDEN)
    expected = step(both[0], x)
    assert_close(step(both[1], x), expected)
    rotary.forward = decoder.attention.rotary.layers.rotary_pos_emb.forward.__get__(rotary)
    assert_close(step(both[1], x), expected)
    assert len(calls) == 2
    rotary.forward = doubled(original_rotary())
    found, expected = (step(module, x) for module in both)
    assert_close(found, expected, rtol=0, atol=0)
    rotary.forward = MethodType(lambda _, *a: doubled(original_rotary())(*a), rotary)
    assert_close(step(both[1], x), expected, rtol=0, atol=0)
    del rotary.__dict__["forward"]
    heard: list[str] = []
    handle = rotary.register_forward_hook(lambda *_: heard.append("hook"))
    both[1](x)
    handle.remove()
    assert heard == ["hook"]
    assert len(calls) == 2


# Who listens


PLACES = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", PLACES)
def test_hooks_of_a_projection_are_called(decoder: ModuleType, place: str, kind: str, calls: list[str]) -> None:
    both, x = pair(decoder), values(2, TOKENS, HIDDEN)
    results, heard = [], []
    for module in both:
        found: list[str] = []
        handle = HOOKS[kind](getattr(module.attention, place), lambda found=found: found.append(kind))
        results.append(step(module, x))
        handle.remove()
        heard.append(found)
    assert heard[0] == heard[1] != []
    assert_close(*reversed(results))
    assert len(calls) == (place == "o_proj")


def test_hooks_of_all_modules_are_called(decoder: ModuleType, calls: list[str]) -> None:
    both, x = pair(decoder), values(2, TOKENS, HIDDEN)
    heard = []
    for module in both:
        found: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda one, *_, found=found: found.append(type(one).__name__)
        )
        module(x)
        handle.remove()
        heard.append(found)
    assert heard[0] == heard[1]
    assert calls == []


class Adapted(nn.Linear):
    """A linear layer that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def changes() -> dict[str, Callable[[nn.Module], Any]]:
    def adapted(attention: nn.Module) -> None:
        old = attention.q_proj
        attention.q_proj = Adapted(HIDDEN, 32, bias=False)
        attention.q_proj.load_state_dict(old.state_dict())

    def forwarded(attention: nn.Module) -> None:
        part = attention.v_proj
        part.forward = MethodType(lambda self, y: 2 * type(self).forward(self, y), part)

    def unnamed(attention: nn.Module) -> None:  # as FSDP does: a plain tensor where the parameter was
        weight = attention.k_proj.weight
        del attention.k_proj.weight
        attention.k_proj.weight = weight.detach()

    def of_a_class(attention: nn.Module) -> None:
        weight = nn.Parameter(attention.v_proj.weight.detach().as_subclass(Named))
        attention.v_proj.weight = weight

    return {
        "a class of its own": adapted,
        "a forward of its own": forwarded,
        "a parametrization": lambda attention: parametrizations.weight_norm(attention.q_proj),
        "a weight that is no parameter": unnamed,
        "a weight of a class of its own": of_a_class,
    }


@pytest.mark.parametrize("change", changes())
def test_what_is_not_plain_is_called(decoder: ModuleType, change: str, calls: list[str]) -> None:
    results = []
    for module in pair(decoder):
        torch.manual_seed(1)
        changes()[change](module.attention)
        x = values(2, TOKENS, HIDDEN).requires_grad_()
        out = module(x)
        results.append([out, *torch.autograd.grad(out.sum(), [x, *module.parameters()])])
    for got, expected in zip(*results, strict=True):
        assert type(got) is type(expected)
        torch.testing.assert_close(got, expected)
    assert calls == []


def test_tables_that_the_op_does_not_know_and_those_that_learn(decoder: ModuleType, calls: list[str]) -> None:
    """Of another dtype, of fewer elements than a head (an error of the class's), and with gradients of their own."""
    both, x = pair(decoder, dtype=torch.bfloat16), values(2, TOKENS, HIDDEN, dtype=torch.bfloat16)
    for module in both:
        module.attention.config._attn_implementation = "eager"
        module.attention.o_proj.float()
    tables = tuple(table.float() for table in both[0].tables)
    errors = []
    for module in both:
        with pytest.raises(RuntimeError) as caught:
            module.attention(x, tables, None)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    both = pair(decoder)
    for module in both:
        with pytest.raises(RuntimeError, match="must match"):
            module.attention(x.float(), tuple(table[..., :4] for table in tables), None)
    results = []
    for module in both:
        cos = tables[0].clone().requires_grad_()
        results.append(torch.autograd.grad(module.attention(x.float(), (cos, tables[1]), None)[0].sum(), cos)[0])
    assert torch.equal(*results)
    assert calls == []


def test_casts_transforms_and_traces_are_pytorchs(decoder: ModuleType, calls: list[str]) -> None:
    """Autocast, functorch, forward-mode AD, subclasses and jit's traces: the modules are called, and nothing is lost."""
    both, x = pair(decoder, Case(implementation="eager")), values(3, 5, HIDDEN)

    def everything(module: nn.Module) -> list[Tensor]:
        weights = dict(module.named_parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = step(module, x)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        by_weights = grad(lambda w: functional_call(module, w, (x,)).square().sum())(weights)
        each = vmap(grad(lambda w, one: functional_call(module, w, (one[None],)).sum()), (None, 0))(weights, x)
        through = jvp(module, (x,), (torch.ones_like(x),))[1]
        traced = torch.jit.trace(module, (x,), check_trace=False)(x)
        return [*cast.values(), dual, *by_weights.values(), *each.values(), through, traced]

    for got, expected in zip(*(everything(module) for module in both), strict=True):
        assert torch.equal(got, expected)
    assert isinstance(both[1](x.as_subclass(Named)), Named)
    assert calls == []


# What runs it again


def test_a_backward_under_autocast_is_that_of_a_forward_without(decoder: ModuleType) -> None:
    """Up to what autocast rounds in the backward of `o_proj` and of the attention itself, which are PyTorch's."""
    _, kernelized = pair(decoder)
    expected, x = step(kernelized, values(2, TOKENS, HIDDEN)), values(2, TOKENS, HIDDEN).requires_grad_()
    out = kernelized(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.backward(values(*out.shape, seed=9))
    found = {"input": x.grad, **{name: parameter.grad for name, parameter in kernelized.named_parameters()}}
    for name, value in found.items():
        assert float((value - expected[name]).norm()) <= 2e-2 * float(expected[name].norm()), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_it_gives_the_same_gradients(decoder: ModuleType, reentrant: bool, calls: list[str]) -> None:
    _, kernelized = pair(decoder)
    x = values(2, TOKENS, HIDDEN)
    expected = step(kernelized, x)
    leaf = x.clone().requires_grad_()
    checkpoint(kernelized, leaf, use_reentrant=reentrant).backward(values(2, TOKENS, HIDDEN, seed=9))
    assert torch.equal(leaf.grad, expected["input"])
    for name, parameter in kernelized.named_parameters():
        assert torch.equal(parameter.grad, expected[name])
    assert len(calls) == 2 + (not reentrant)


@pytest.mark.parametrize("case", [Case(), Case(MistralAttention, MistralConfig), NORMED])
@pytest.mark.usefixtures("way")
def test_compiles_to_one_graph_with_the_same_gradients_and_exports(decoder: ModuleType, case: Case) -> None:
    _, kernelized = pair(decoder, case)
    x = values(2, TOKENS, HIDDEN)
    expected = step(kernelized, x)
    torch._dynamo.reset()
    compiled = torch.compile(kernelized, fullgraph=True, backend="aot_eager")
    found = step(compiled, x)
    assert_close({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected["result"], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    program = torch.export.export(kernelized, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), expected["result"], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_compiled_for_any_number_of_tokens_it_is_compiled_once(decoder: ModuleType) -> None:
    _, kernelized = pair(decoder, tokens=12)
    cos, sin = kernelized.tables
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(kernelized.attention, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (5, 9, 12):
        x, tables = values(2, tokens, HIDDEN), (cos[:, :tokens], sin[:, :tokens])
        expected = kernelized.attention(x, tables)[0]
        torch.testing.assert_close(compiled(x, tables)[0], expected)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert any("autograd_function" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("case", [Case(bias=True), Case(Qwen2Attention, Qwen2Config), NORMED])
@pytest.mark.usefixtures("way")
def test_gradients_of_gradients_are_the_models_own(decoder: ModuleType, case: Case) -> None:
    results = []
    for module in pair(decoder, case._replace(implementation="eager"), torch.float64):
        for frozen in (False, True):
            for parameter in module.parameters():
                parameter.requires_grad_(not frozen)
            x = values(2, 5, HIDDEN, dtype=torch.float64).requires_grad_()
            leaves = [x, *(parameter for parameter in module.parameters() if not frozen)]
            first = torch.autograd.grad(module(x.tanh()).square().sum(), leaves, create_graph=True)
            penalty = sum(one.square().sum() for one in first)
            results.append([*first, *torch.autograd.grad(penalty, leaves)])
    for got, expected in ((results[2], results[0]), (results[3], results[1])):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("way")
def test_batched_and_repeated_backwards(decoder: ModuleType) -> None:
    original, kernelized = pair(decoder, Case(implementation="eager"))
    x = values(2, TOKENS, HIDDEN).requires_grad_()
    seeds = torch.stack([values(2, TOKENS, HIDDEN, seed=seed) for seed in (1, 2)])
    for module in (original, kernelized):
        y = module(x)
        once = [torch.autograd.grad(y, x, seed, retain_graph=True)[0] for seed in seeds]
        (batched,) = torch.autograd.grad(y, x, seeds, is_grads_batched=True)
        torch.testing.assert_close(batched, torch.stack(once), rtol=1e-4, atol=1e-5)


# Within a decoder layer, with the ops for GPUs done by PyTorch


class Layer(nn.Module):
    """A decoder layer with its tables."""

    def __init__(self, layer: nn.Module, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.layer, self.tables = layer, (cos, sin)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, position_embeddings=tuple(table.to(x.dtype) for table in self.tables))


@pytest.fixture
def ops(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that were called."""
    found: list[str] = []
    plain, rotary_of = decoder.plain, decoder.attention.rotary.apply_rotary

    def rotary_projections(x: Tensor, projections: Any, cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, ...]:
        operands = (x, *projections, cos, sin)
        assert not (torch.is_grad_enabled() and any(of is not None and of.requires_grad for of in operands))
        found.append("rotary_projections")
        q, k, v = (F.linear(x, *projections[at : at + 2]) for at in (0, 2, 4))
        q, k = rotary_of(q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim)), cos, sin, 2)
        return q.flatten(-2), k.flatten(-2), v

    def add_product(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        assert not (torch.is_grad_enabled() and any(of.requires_grad for of in (x, weight, residual)))
        found.append("add_product")
        return residual + F.linear(x, weight)

    monkeypatch.setattr(decoder.hopper, "may_take_rows", lambda x: True)
    monkeypatch.setattr(decoder.hopper, "takes_projections", plain.takes_projections)
    monkeypatch.setattr(decoder.hopper, "takes_add", lambda x, weight, residual: type(residual) is Tensor)
    monkeypatch.setattr(decoder.hopper, "takes", lambda *_: False)
    monkeypatch.setattr(decoder.hopper, "rotary_projections", rotary_projections)
    monkeypatch.setattr(decoder.hopper, "add_product", add_product)
    marks = {
        "GatedMLP": (LlamaMLP, Qwen3MLP),
        "RMSNorm": (LlamaRMSNorm, Qwen3RMSNorm),
        "RotaryAttention": (LlamaAttention,),
        "NormedRotaryAttention": (Qwen3Attention,),
    }
    for name, classes in marks.items():
        for cls in classes:
            monkeypatch.setattr(cls, "kernel_layer_name", name, raising=False)
    return found


def layers(decoder: ModuleType, case: Case = PLAIN) -> tuple[Layer, Layer]:
    attention = made(case)
    config = attention.attention.config
    config.intermediate_size, config.mlp_bias = 64, case.bias
    kind = Qwen3DecoderLayer if case.cls is Qwen3Attention else LlamaDecoderLayer
    original = Layer(kind(config, 0), *attention.tables)
    for parameter in original.layer.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    kernelized = copy.deepcopy(original)
    kernelized.layer.forward = decoder.layers.DecoderLayer.forward.__get__(kernelized.layer)
    return original, kernelized


def test_a_decoder_layer_adds_the_attentions_product_to_the_residual(
    decoder: ModuleType, ops: list[str], calls: list[str]
) -> None:
    """With gradients and without; whether the attention runs its class's forward or the kernel's."""
    original, kernelized = layers(decoder)
    x = values(2, TOKENS, HIDDEN)
    for _ in range(2):
        assert_close(step(kernelized, x), step(original, x))
        with torch.no_grad():
            torch.testing.assert_close(kernelized(x), original(x), rtol=1e-4, atol=1e-5)
        assert ops == ["rotary_projections", "add_product", "add_product"] * 2
        ops.clear()
        inner = kernelized.layer.self_attn
        inner.forward = decoder.layers.RotaryAttention.forward.__get__(inner)
    assert len(calls) == 2
    assert joined(kernelized(x.clone().requires_grad_())) == {}
    with torch.no_grad():
        before = x.clone()
        kernelized(x)
        assert torch.equal(x, before)


def test_a_decoder_layer_has_its_mlp_added_in_one_op(
    decoder: ModuleType, ops: list[str], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients and without; the op that keeps what a backward needs only with them."""

    def parts(x: Tensor, weights: Any, residual: Tensor, product: str) -> tuple[Tensor, Tensor, Tensor]:
        assert not torch.is_grad_enabled()
        assert product == "SiLUActivation"
        gate, up = F.linear(x, weights.gate), F.linear(x, weights.up)
        return residual + F.linear(F.silu(gate) * up, weights.down), gate, up

    def added_mlp(*of: Any) -> Tensor:
        ops.append("added_mlp")
        return parts(*of)[0]

    def added_mlp_parts(*of: Any) -> tuple[Tensor, Tensor, Tensor]:
        ops.append("added_mlp_parts")
        return parts(*of)

    monkeypatch.setattr(decoder.hopper, "takes_added_mlp", lambda x, weights, *_: weights.down_bias is None)
    monkeypatch.setattr(decoder.hopper, "added_mlp", added_mlp)
    monkeypatch.setattr(decoder.hopper, "added_mlp_parts", added_mlp_parts)
    original, kernelized = layers(decoder)
    x = values(2, TOKENS, HIDDEN)
    assert_close(step(kernelized, x), step(original, x))
    assert ops == ["rotary_projections", "add_product", "added_mlp_parts"]
    ops.clear()
    with torch.no_grad():
        torch.testing.assert_close(kernelized(x), original(x), rtol=1e-4, atol=1e-5)
    assert ops == ["rotary_projections", "add_product", "added_mlp"]


def test_an_mlp_of_one_weight_for_gate_and_up_is_added_in_one_op_without_gradients(
    decoder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With them its product's gradient is of both in one."""
    gate, down, x, residual = (
        values(128, 16, seed=1),
        values(24, 64, seed=2),
        values(5, 16, seed=3),
        values(5, 24, seed=4),
    )
    found: list[tuple[Tensor, ...]] = []

    def added_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, residual: Tensor, function: int) -> Tensor:
        found.append((gate, up))
        return residual + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    monkeypatch.setattr(decoder.hopper, "takes_added_mlp", lambda *_: True)
    monkeypatch.setattr(decoder.hopper, "ops", SimpleNamespace(added_mlp=added_mlp))
    weights = decoder.plain.Weights(gate, None, None, None, down, None)
    first, second = F.linear(x, gate).chunk(2, -1)
    expected = residual + F.linear(F.silu(first) * second, down)
    with torch.no_grad():
        torch.testing.assert_close(decoder.functions.add_gated_mlp(x, residual, weights), expected)
    assert [torch.equal(*pair) for pair in zip(found[0], gate.chunk(2), strict=True)] == [True, True]
    leaves = [of.clone().requires_grad_() for of in (x, residual, gate, down)]
    made = decoder.functions.add_gated_mlp(*leaves[:2], weights._replace(gate=leaves[2], down=leaves[3]))
    torch.testing.assert_close(made, expected)
    assert [of.shape for of in torch.autograd.grad(made.sum(), leaves)] == [of.shape for of in leaves]
    assert len(found) == 1


@given(
    down=st.integers(1, 64), depth=st.integers(1, 64), features=st.integers(1, 40), across=st.integers(1, 24),
    pairs=st.integers(0, 80),
)  # fmt: skip
@settings(max_examples=300)
def test_one_launch_for_an_mlp_is_asked_for_where_its_tiles_in_turn_are_made_sooner(
    decoder: ModuleType, down: int, depth: int, features: int, across: int, pairs: int
) -> None:
    """Against each pair's steps, counted; of the rows a last tile has one, of the features a whole number of tiles."""
    asked = decoder.hopper._saves(256 * down - 255, 64 * depth, 128 * features, 256 * across, pairs)
    if pairs == 0:
        assert not asked
        return

    def longest(*steps: int) -> int:
        """Of all pairs, where each in turn takes a tile of so many steps."""
        return max(sum(steps[pair::pairs]) for pair in range(pairs))

    first, last = [depth] * (down * features), [2 * features] * (down * across)
    apart, together = longest(*first) + longest(*last), longest(*first, *last)
    if asked:
        assert down >= 16
        assert len(last) >= 2 * pairs
        assert together <= 0.99 * apart
    elif down >= 16 and len(last) >= 2 * pairs:
        assert together >= 0.99 * apart


def test_of_any_number_of_rows_compiled_programs_ask_it_once(decoder: ModuleType) -> None:
    """A program for each answer, however many reasons one has."""
    graphs: list[Any] = []
    torch._dynamo.reset()

    def asks(x: Tensor) -> Tensor:
        return x + 1 if decoder.hopper._saves(x.shape[0], 512, 1024, 512, 5) else x

    compiled = torch.compile(asks, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph)
    found = set()
    for rows in range(2, 12_000, 171):
        x = torch.zeros(rows, 1)
        answer = decoder.hopper._saves(rows, 512, 1024, 512, 5)
        assert torch.equal(compiled(x), x + bool(answer))
        found.add(bool(answer))
    assert found == {False, True}
    assert len(graphs) == 2


def test_a_decoder_layer_adds_the_product_of_an_attention_with_norms_to_the_residual(
    decoder: ModuleType, ops: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its heads are wider than the model, too. The norms are called, with each head by itself."""
    seen: list[tuple[int, ...]] = []

    def listen(_: nn.Module, args: tuple[Tensor], __: Tensor) -> None:
        seen.append(tuple(args[0].shape))

    for case in (NORMED, NORMED._replace(heads=8)):
        original, kernelized = layers(decoder, case)
        x = values(2, TOKENS, HIDDEN)
        assert_close(step(kernelized, x), step(original, x), atol=1e-4)
        assert ops == ["add_product", "add_product"]
        with torch.no_grad():
            torch.testing.assert_close(kernelized(x), original(x), rtol=1e-4, atol=1e-4)
        assert ops == ["add_product"] * 4
        ops.clear()
        for name in ("q_norm", "k_norm"):
            kernelized.layer.self_attn.get_submodule(name).register_forward_hook(listen)
        kernelized(x)
        assert seen == [(2, TOKENS, case.heads, 8), (2, TOKENS, 1, 8)]
        seen.clear()
        ops.clear()
    for needed in ("q_norm.weight", "k_norm.weight"):  # alone
        original, kernelized = layers(decoder, NORMED)
        grads = []
        for module in (original, kernelized):
            module.requires_grad_(False)
            weight = module.layer.self_attn.get_parameter(needed).requires_grad_()
            grads += torch.autograd.grad(module(x).square().sum(), weight)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    ops.clear()
    monkeypatch.setattr(decoder.hopper, "takes_add", lambda *_: False)
    monkeypatch.setattr(decoder.attention, "_normed", lambda *_: pytest.fail("nothing to gain: the class's forward"))
    with torch.no_grad():
        torch.testing.assert_close(kernelized(x), original(x), rtol=1e-4, atol=1e-4)
    assert ops == []


def test_what_needs_no_gradient_gets_none_of_the_added_product(decoder: ModuleType, ops: list[str]) -> None:
    operands = values(2, 3, 8, seed=1), values(6, 8, seed=2), values(2, 3, 6, seed=3)
    seed = values(2, 3, 6, seed=4)
    leaves = [of.clone().requires_grad_() for of in operands]
    wanted = torch.autograd.grad(leaves[2] + F.linear(leaves[0], leaves[1]), leaves, seed)
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        leaves = [of.clone().requires_grad_(at in chosen) for at, of in enumerate(operands)]
        decoder.attention.add_product(*leaves).backward(seed)
        for at, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (at in chosen)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, wanted[at])
    leaves = [of.clone().requires_grad_() for of in operands]
    twice = [
        torch.autograd.grad(
            sum(
                one.square().sum()
                for one in torch.autograd.grad(add(*leaves).square().sum(), leaves, create_graph=True)
            ),
            leaves,
        )
        for add in (decoder.attention.add_product, lambda x, weight, residual: residual + F.linear(x, weight))
    ]
    for got, expected in zip(*twice, strict=True):
        torch.testing.assert_close(got, expected)
    assert set(ops) == {"add_product"}


def listens(module: nn.Module) -> list[str]:
    heard: list[str] = []
    module.register_forward_hook(lambda *_: heard.append("called"))
    return heard


@pytest.mark.parametrize("place", ["self_attn", "self_attn.o_proj", "self_attn.k_proj"])
def test_in_a_decoder_layer_what_is_listened_to_is_called(decoder: ModuleType, ops: list[str], place: str) -> None:
    original, kernelized = layers(decoder)
    x = values(2, TOKENS, HIDDEN)
    heard = listens(kernelized.layer.get_submodule(place))
    assert_close(step(kernelized, x), step(original, x))
    with torch.no_grad():
        torch.testing.assert_close(kernelized(x), original(x), rtol=1e-4, atol=1e-5)
    assert heard == ["called"] * 2
    assert ops == ["add_product"], "the MLP's, with gradients"


def test_in_a_decoder_layer_another_forward_of_the_attention_runs(decoder: ModuleType, ops: list[str]) -> None:
    _, kernelized = layers(decoder)
    x = values(2, TOKENS, HIDDEN)
    inner = kernelized.layer.self_attn
    inner.forward = lambda hidden_states, **_: (hidden_states * 0, None)
    with torch.no_grad():
        found = kernelized(x)
        mlp = kernelized.layer.mlp(kernelized.layer.post_attention_layernorm(x))
    torch.testing.assert_close(found, x + mlp, rtol=1e-4, atol=1e-5)
    assert ops == []


def test_in_a_decoder_layer_an_attention_with_a_forward_of_its_own_runs_it(decoder: ModuleType, ops: list[str]) -> None:
    """That comes from a marked class, and has its mark; in a module with all that Llama's has."""

    class Other(LlamaAttention):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            return hidden_states * 0, None

    Other.forward = FunctionType(Other.forward.__code__, vars(modeling_llama))
    _, kernelized = layers(decoder)
    x = values(2, TOKENS, HIDDEN)
    kernelized.layer.self_attn.__class__ = Other
    with torch.no_grad():
        found = kernelized(x)
        mlp = kernelized.layer.mlp(kernelized.layer.post_attention_layernorm(x))
    torch.testing.assert_close(found, x + mlp, rtol=1e-4, atol=1e-5)
    assert ops == []


def test_a_decoder_layer_whose_last_products_have_biases_adds_them_as_before(
    decoder: ModuleType, ops: list[str]
) -> None:
    original, kernelized = layers(decoder, Case(bias=True))
    inner = kernelized.layer.self_attn
    inner.forward = decoder.layers.RotaryAttention.forward.__get__(inner)
    x = values(2, TOKENS, HIDDEN)
    assert_close(step(kernelized, x), step(original, x), atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(kernelized(x), original(x), rtol=1e-4, atol=1e-4)
    assert ops == ["rotary_projections"] * 2, "the attention's module is called, and has it"


def test_a_decoder_layer_where_only_the_projections_have_an_op(
    decoder: ModuleType, ops: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder.hopper, "takes_add", lambda *_: False)
    original, kernelized = layers(decoder)
    x = values(2, TOKENS, HIDDEN)
    assert_close(step(kernelized, x), step(original, x))
    with torch.no_grad():
        torch.testing.assert_close(kernelized(x), original(x), rtol=1e-4, atol=1e-5)
    assert ops == ["rotary_projections"] * 2


def test_a_decoder_layer_where_only_the_sum_has_an_op(
    decoder: ModuleType, ops: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the heads are together as wide as the model or not; it is asked with the shape that it will be given."""
    monkeypatch.setattr(decoder.hopper, "takes_projections", lambda *_: False)
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(decoder.hopper, "takes_add", lambda x, *_: not asked.append(tuple(x.shape)))
    for heads in (6, 4):
        original, kernelized = layers(decoder, Case(heads=heads))
        x = values(2, TOKENS, HIDDEN)
        with torch.no_grad():
            torch.testing.assert_close(kernelized(x), original(x), rtol=1e-4, atol=1e-5)
        assert ops == ["add_product", "add_product"]
        assert asked == [(2, TOKENS, heads * 8), (2, TOKENS, heads * 8), (2, TOKENS, 64)]
        ops.clear()
        assert_close(step(kernelized, x), step(original, x))
        assert ops == ["add_product", "add_product"]
        ops.clear()
        asked.clear()


def test_without_gradients_the_attention_by_itself_has_the_op(decoder: ModuleType, ops: list[str]) -> None:
    original, kernelized = pair(decoder)
    x = values(2, TOKENS, HIDDEN)
    with torch.no_grad():
        torch.testing.assert_close(kernelized(x), original(x))
    kernelized.requires_grad_(False)
    torch.testing.assert_close(kernelized(x), original(x))
    assert ops == ["rotary_projections"] * 2


@pytest.mark.parametrize("case", [PLAIN, NORMED])
def test_compiled_the_products_of_an_inputs_gradient_are_added_where_the_first_lies(
    decoder: ModuleType, case: Case
) -> None:
    _, kernelized = pair(decoder, case)
    expected = step(kernelized, x := values(2, TOKENS, HIDDEN))
    found, totals = sums_of_a_compiled(step, kernelized, x)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert len(totals) == 2
    assert len(set(totals)) == 1


def test_compiled_sums_of_products_have_gradients_of_gradients(decoder: ModuleType) -> None:
    """By compiled autograd; AOT's own programs have none."""
    found = []
    for module, compiles in zip(
        pair(decoder, Case(implementation="eager"), torch.float64),
        (nullcontext(), compiled_autograd._enable(torch.compile(backend="aot_eager"))),
        strict=True,
    ):
        torch._dynamo.reset()
        x = values(2, TOKENS, HIDDEN, dtype=torch.float64).requires_grad_()
        out = module(x).square().sum()
        with compiles:
            (first,) = torch.autograd.grad(out, x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found)
    torch._dynamo.reset()


def test_many_gradients_at_once_of_what_was_compiled(decoder: ModuleType) -> None:
    found = []
    for module in pair(decoder):
        torch._dynamo.reset()
        x = values(2, TOKENS, HIDDEN).requires_grad_()
        out = torch.compile(module, backend="eager")(x)
        (batch,) = torch.autograd.grad(out, x, values(3, *out.shape), is_grads_batched=True)
        found.append(batch)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    total, x, weight = values(3, 2, 4), values(3, 2, 5), values(5, 4)
    expected = total + x @ weight
    vmap(lambda total, x: (decoder.sums._op(total, x, weight), total)[1])(total, x)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("case", [PLAIN, NORMED])
def test_a_decoder_layer_with_the_ops_compiles_to_one_graph(decoder: ModuleType, ops: list[str], case: Case) -> None:
    original, kernelized = layers(decoder, case)
    x = values(2, TOKENS, HIDDEN)
    torch._dynamo.reset()
    compiled = torch.compile(kernelized, fullgraph=True, backend="aot_eager")
    found = step(compiled, x)
    assert_close(
        {name.removeprefix("_orig_mod."): value for name, value in found.items()}, step(original, x), atol=1e-4
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), original(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
