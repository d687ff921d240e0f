"""kernelhub/decoder with gradients: against float64, what it keeps, and when it calls the modules instead."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernelprojects import load_compiled
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, Phi3Config, T5Config
from transformers.activations import GELUTanh
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HIDDEN, BETWEEN = 32, 48


@pytest.fixture(scope="session")
def decoder(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("decoder", request.config, "cpu")


@pytest.fixture(params=["compiled", "pytorch"])
def way(request: pytest.FixtureRequest, decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled ops of the kernels that it depends on, and without."""
    assert decoder.functions.norm.compiled.HERE
    assert decoder.functions.activation.compiled.HERE
    if request.param == "pytorch":
        without(decoder, monkeypatch)
    return request.param


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What is small is done sooner by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def without(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (decoder.functions.norm, decoder.functions.activation):
        for place in (kernel.functions, kernel.compiled):
            monkeypatch.setattr(place, "takes", lambda *_: False)


def llama(act: str = "silu", bias: bool = False) -> nn.Module:
    return LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=BETWEEN, hidden_act=act, mlp_bias=bias))


def phi(act: str = "silu", bias: bool = False) -> nn.Module:
    made = Phi3MLP(Phi3Config(hidden_size=HIDDEN, intermediate_size=BETWEEN, hidden_act=act, pad_token_id=0))
    if bias:
        made.gate_up_proj, made.down_proj = nn.Linear(HIDDEN, 2 * BETWEEN), nn.Linear(BETWEEN, HIDDEN)
    return made


def t5(act: str = "gelu_new", bias: bool = False) -> nn.Module:
    config = T5Config(d_model=HIDDEN, d_ff=BETWEEN, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    config.dense_act_fn = act
    made = T5DenseGatedActDense(config)
    if bias:
        made.wi_0, made.wi_1, made.wo = (
            nn.Linear(HIDDEN, BETWEEN),
            nn.Linear(HIDDEN, BETWEEN),
            nn.Linear(BETWEEN, HIDDEN),
        )
    return made


MLPS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "GatedMLP": (llama, "act_fn"),
    "PackedGatedMLP": (phi, "activation_fn"),
    "GatedFeedForward": (t5, "act"),
}


def pair(
    decoder: ModuleType, layer: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """A model's MLP, and the same with the kernel's forward."""
    torch.manual_seed(0)
    original = MLPS[layer][0](**options).to(dtype)
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.3)
    return original, bound(decoder, layer, copy.deepcopy(original))


def bound(decoder: ModuleType, layer: str, module: nn.Module) -> nn.Module:
    module.forward = getattr(decoder.layers, layer).forward.__get__(module)
    return module


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(module: Callable[..., Tensor], x: Tensor, **options: Any) -> dict[str, Tensor]:
    """The result, and the gradients of the input and of every parameter."""
    x = x.detach().clone().requires_grad_()
    out = module(x, **options)
    out.backward(values(*out.shape, dtype=out.dtype, seed=9))
    found = {"result": out.detach(), "input": x.grad}
    for name, parameter in module.named_parameters():
        found[name] = parameter.grad
        parameter.grad = None
    return found


def assert_as_near(got: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """As far from float64 as the separate operations, on the whole, but for chance; or a unit of rounding."""
    assert got.keys() == eager.keys()
    for name, reference in exact.items():
        assert got[name].dtype == eager[name].dtype, name
        assert got[name].shape == eager[name].shape, name
        error, allowed = (float((x[name].double() - reference).norm()) for x in (got, eager))
        unit = torch.finfo(got[name].dtype).eps * float(reference.norm())
        unit = 4 * unit if got[name].dtype == torch.float64 else unit / 8  # in float64 the model's own is the reference
        assert error <= 1.5 * allowed + unit, (name, error, allowed, unit)


def counted(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each MLP that has a backward of its own from now on."""
    calls, function = [], decoder.gated._GatedMLP.apply
    monkeypatch.setattr(decoder.gated._GatedMLP, "apply", lambda *a: (calls.append(a[0]), function(*a))[1])
    return calls


FORMS = [("GatedMLP", "silu", False, dtype) for dtype in DTYPES] + [
    (*form, dtype)
    for form in (
        ("GatedMLP", "gelu", True), ("GatedMLP", "gelu_new", False), ("PackedGatedMLP", "silu", True),
        ("PackedGatedMLP", "gelu_pytorch_tanh", False), ("GatedFeedForward", "gelu_new", True),
    )
    for dtype in DTYPES[:2]
]  # fmt: skip


@pytest.mark.parametrize(("layer", "act", "bias", "dtype"), FORMS, ids=str)
@pytest.mark.usefixtures("way")
def test_result_and_gradients_are_as_near_to_float64_as_the_models_own(
    decoder: ModuleType, layer: str, act: str, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(decoder, monkeypatch)
    original, kernelized = pair(decoder, layer, dtype, act=act, bias=bias)
    for shape in ((3, 40, HIDDEN), (7, HIDDEN), (2, 0, HIDDEN)):
        x = values(*shape, dtype=dtype)
        assert_as_near(step(kernelized, x), step(original, x), step(copy.deepcopy(original).double(), x.double()))
    assert len(calls) == 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("way")
def test_whatever_needs_a_gradient_gets_it(decoder: ModuleType, packed: bool) -> None:
    """Each operand alone, each pair, and all of them: those gradients, and no other."""
    shapes = [(5, 8), (5, 8), (20, 8), (20,), (20, 8), (20,), (8, 20 - 10 * packed), (8,)]
    operands = [values(*shape, dtype=torch.float64, seed=seed) for seed, shape in enumerate(shapes)]
    names = [at for at in range(8) if not packed or at not in (4, 5)]

    def formula(x: Tensor, residual: Tensor, *w: Tensor) -> Tensor:
        gate = F.linear(x, w[0], w[1])
        gate, up = gate.chunk(2, -1) if packed else (gate, F.linear(x, w[2], w[3]))
        return residual + F.linear(F.silu(gate) * up, w[4], w[5])

    def ours(x: Tensor, residual: Tensor, *w: Tensor) -> Tensor:
        weights = decoder.plain.Weights(*w[:2], *((None, None) if packed else w[2:4]), *w[4:])
        return decoder.gated.gated_mlp(x, weights, "SiLU", residual)

    leaves = [x.clone().requires_grad_() for x in operands]
    seed = values(5, 8, dtype=torch.float64, seed=20)
    wanted = dict(zip(names, torch.autograd.grad(formula(*leaves), [leaves[at] for at in names], seed), strict=True))
    for chosen in itertools.chain.from_iterable(itertools.combinations(names, n) for n in (1, 2, len(names))):
        leaves = [x.clone().requires_grad_(at in chosen) for at, x in enumerate(operands)]
        ours(*leaves).backward(seed)
        for at, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (at in chosen)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, wanted[at])


def kept(call: Callable[[], Tensor]) -> list[Tensor]:
    """What a forward keeps for its backward, each memory once."""
    found: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (found.setdefault(x.data_ptr(), x), x)[1], lambda x: x):
        call()
    return list(found.values())


@pytest.mark.usefixtures("way")
def test_the_product_is_not_kept(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, x = 11, values(11, HIDDEN).requires_grad_()
    for layer, wide in (("GatedMLP", BETWEEN), ("PackedGatedMLP", 2 * BETWEEN), ("GatedFeedForward", BETWEEN)):
        original, kernelized = pair(decoder, layer)
        own = {p.data_ptr() for p in kernelized.parameters()}
        between = [held for held in kept(lambda m=kernelized: m(x)) if held.data_ptr() not in own]
        gates = 1 if layer == "PackedGatedMLP" else 2
        assert sorted(tuple(held.shape) for held in between) == [(rows, HIDDEN), *[(rows, wide)] * gates], layer
        assert len(kept(lambda m=original: m(x))) > len(kept(lambda m=kernelized: m(x)))
        for parameter in kernelized.parameters():
            parameter.requires_grad_(False)
        between = [held for held in kept(lambda m=kernelized: m(x)) if held.data_ptr() not in own]
        assert sorted(tuple(held.shape) for held in between) == [(rows, wide)] * gates, f"{layer}, frozen"


# The decoder layer


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "kernel_layer_name", "GatedMLP", raising=False)
    monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)


class Layer(nn.Module):
    """A decoder layer with its positions."""

    def __init__(self, layer: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, x: Tensor) -> Tensor:
        tables = self.rotary(x, torch.arange(x.shape[1])[None])
        return self.layer(x, position_embeddings=tuple(table.to(x.dtype) for table in tables))


def layers(decoder: ModuleType, dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[Layer, Layer]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=BETWEEN, num_attention_heads=4, num_key_value_heads=2, mlp_bias=bias
    )
    config._attn_implementation = "sdpa"
    original = Layer(LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)).to(dtype)
    for parameter in original.layer.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    kernelized = copy.deepcopy(original)
    bound(decoder, "DecoderLayer", kernelized.layer)
    return original, kernelized


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "dtype", DTYPES[:3], ids=str
)  # in float64 the model's norm rounds to float32, and the kernel does not
@pytest.mark.usefixtures("way", "marked")
def test_a_decoder_layer_is_as_near_to_float64_as_the_models_own(
    decoder: ModuleType, dtype: torch.dtype, bias: bool
) -> None:
    original, kernelized = layers(decoder, dtype, bias)
    x = values(2, 30, HIDDEN, dtype=dtype)
    exact = step(copy.deepcopy(original).double(), x.double())
    assert_as_near(step(kernelized, x), step(original, x), exact)
    with torch.no_grad():
        before = x.clone()
        ours, theirs = ({"result": module(x)} for module in (kernelized, original))
        assert torch.equal(x, before)
        assert_as_near(ours, theirs, {"result": exact["result"]})


def sums_of_a_compiled(
    step: Callable[..., dict[str, Tensor]], module: nn.Module, x: Tensor
) -> tuple[dict[str, Tensor], list[str]]:
    """What the step finds of the module, compiled; and what its backward's code adds products to, where those lie."""
    torch._dynamo.reset()
    with fresh_cache():
        found, (_, backward) = run_and_get_code(step, torch.compile(module, fullgraph=True), x)
    torch._dynamo.reset()
    totals = re.findall(r"\.add_product_\.default\((\w+),", backward)
    for total in totals:
        assert f"out={total})" in backward  # a product, and no copy of one
    assert "addmm" not in backward
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}, totals


def joined(out: Tensor) -> dict[str, int]:
    """Where gradients come together that the engine adds, and how many."""
    found: dict[tuple[Any, int], int] = {}
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            for edge in node.next_functions:
                found[edge] = found.get(edge, 0) + 1
                waiting.append(edge[0])
    return {node.name(): count for (node, _), count in found.items() if node is not None and count > 1}


@pytest.mark.parametrize("wider", [False, True])
def test_no_op_without_gradients_is_called_where_they_are_asked_for(
    decoder: ModuleType, monkeypatch: pytest.MonkeyPatch, wider: bool
) -> None:
    """As the op for GPUs is, here by PyTorch's code: also where the residual is of another dtype than the MLP."""

    def parts(x: Tensor, weights: Any, product: str) -> tuple[Tensor, Tensor, Tensor]:
        assert not torch.is_grad_enabled()
        gate, up = F.linear(x, weights.gate), F.linear(x, weights.up)
        return F.silu(gate) * up, gate, up

    monkeypatch.setattr(decoder.hopper, "takes", lambda x, weights, product: decoder.plain.takes(x, weights))
    monkeypatch.setattr(decoder.hopper, "gated_product_parts", parts)
    monkeypatch.setattr(decoder.hopper, "gated_product", lambda *operands: parts(*operands)[0])
    x, residual = values(5, 8), values(5, 8, dtype=torch.float64 if wider else torch.float32, seed=1)
    leaves = [values(*shape, seed=at + 2).requires_grad_() for at, shape in enumerate(((20, 8), (20, 8), (8, 20)))]
    gate, up, last = leaves
    made = decoder.functions.add_gated_mlp(x, residual, decoder.plain.Weights(gate, None, up, None, last, None))
    expected = residual + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), last)
    torch.testing.assert_close(made, expected)
    for got, wanted in zip(
        torch.autograd.grad(made.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        weights = decoder.plain.Weights(gate, None, up, None, last, None)
        torch.testing.assert_close(decoder.functions.add_gated_mlp(x, residual, weights), expected)


@pytest.mark.usefixtures("marked")
def test_no_gradient_of_a_decoder_layer_is_added_in_a_pass_of_its_own(decoder: ModuleType) -> None:
    """But for those of q, k and v, which are products of transformers'."""
    original, kernelized = layers(decoder)
    x = values(2, 5, HIDDEN).requires_grad_()
    rotary = {"TransposeBackward0": 3}  # of q and k, as transformers rotates them
    assert joined(kernelized(x)) == {"_RmsNormAndInputBackward": 3} | rotary
    assert joined(original(x)).keys() > rotary.keys() | {"AddBackward0", "MulBackward0"}


HOOKS = {
    "forward": lambda module, hook: module.register_forward_hook(lambda *_: hook()),
    "pre-forward": lambda module, hook: module.register_forward_pre_hook(lambda *_: hook()),
    "backward": lambda module, hook: module.register_full_backward_hook(lambda *_: hook()),
    "pre-backward": lambda module, hook: module.register_full_backward_pre_hook(lambda *_: hook()),
}
PLACES = {
    "GatedMLP": ("gate_proj", "up_proj", "down_proj", "act_fn"),
    "PackedGatedMLP": ("gate_up_proj", "down_proj", "activation_fn"),
    "GatedFeedForward": ("wi_0", "wi_1", "wo", "act", "dropout"),
    "DecoderLayer": (
        "layer.mlp", "layer.mlp.gate_proj", "layer.mlp.up_proj", "layer.mlp.down_proj", "layer.mlp.act_fn",
        "layer.input_layernorm", "layer.post_attention_layernorm",
    ),
}  # fmt: skip


def made(decoder: ModuleType, layer: str) -> tuple[nn.Module, nn.Module, Tensor]:
    if layer == "DecoderLayer":
        return *layers(decoder), values(2, 5, HIDDEN)
    return *pair(decoder, layer), values(5, HIDDEN)


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("layer", "place"), [(layer, place) for layer in PLACES for place in PLACES[layer]])
@pytest.mark.usefixtures("marked")
def test_hooks_of_a_layer_s_parts_are_called(decoder: ModuleType, layer: str, place: str, kind: str) -> None:
    *both, x = made(decoder, layer)
    heard: list[list[str]] = []
    results = []
    for module in both:
        calls: list[str] = []
        handle = HOOKS[kind](module.get_submodule(place), lambda calls=calls: calls.append(kind))
        results.append(step(module, x))
        if not kind.endswith("backward"):
            with torch.no_grad():
                module(x)
        handle.remove()
        heard.append(calls)
    assert heard[0] == heard[1] != []
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", PLACES["GatedMLP"])
@pytest.mark.usefixtures("marked")
def test_a_norm_and_its_sibling_mlp_call_what_is_listened_to(decoder: ModuleType, place: str) -> None:
    """The two as one kernel computes them: hooks and forwards that came to the MLP's parts later."""
    torch.manual_seed(0)
    norm, mlp = LlamaRMSNorm(HIDDEN), llama()
    nn.init.normal_(norm.weight)
    kernel = decoder.layers.RMSNormGatedMLPLayout(norm, mlp)
    forward, x = decoder.layers.RMSNormGatedMLP.forward, values(5, HIDDEN)
    calls: list[str] = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            expected = mlp(norm(x))
            torch.testing.assert_close(forward(kernel, x), expected, rtol=1e-4, atol=1e-5)
            handle = mlp.get_submodule(place).register_forward_hook(lambda *_: calls.append(place))
            torch.testing.assert_close(forward(kernel, x), expected, rtol=1e-4, atol=1e-5)
            handle.remove()
            part = mlp.get_submodule(place)
            part.forward = lambda y, part=part: 2 * type(part).forward(part, y)
            torch.testing.assert_close(forward(kernel, x), mlp(norm(x)), rtol=1e-4, atol=1e-5)
            del part.forward
    assert calls == [place, place]


@pytest.mark.usefixtures("marked")
def test_a_norm_and_its_sibling_mlp_read_the_norm_as_it_is(decoder: ModuleType) -> None:
    torch.manual_seed(0)
    norm, mlp = LlamaRMSNorm(HIDDEN), llama()
    kernel = decoder.layers.RMSNormGatedMLPLayout(norm, mlp)
    forward, x = decoder.layers.RMSNormGatedMLP.forward, values(5, HIDDEN)
    norm.variance_epsilon = 0.5
    torch.testing.assert_close(forward(kernel, x), mlp(norm(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("marked")
@pytest.mark.parametrize("cls", [LlamaRMSNorm, LlamaMLP])
def test_a_norm_and_its_sibling_mlp_of_another_forward_are_refused(decoder: ModuleType, cls: type[nn.Module]) -> None:
    norm, mlp = LlamaRMSNorm(HIDDEN), llama()
    own = type("Own", (cls,), {"forward": lambda _, x: x})
    (norm if cls is LlamaRMSNorm else mlp).__class__ = own
    with pytest.raises(TypeError, match="Own has another forward than the one marked as"):
        decoder.layers.RMSNormGatedMLPLayout(norm, mlp)


@pytest.mark.parametrize("layer", PLACES)
@pytest.mark.usefixtures("marked")
def test_hooks_of_all_modules_are_called(decoder: ModuleType, layer: str) -> None:
    *both, x = made(decoder, layer)
    everywhere = nn.modules.module
    for register in (
        everywhere.register_module_forward_hook, everywhere.register_module_forward_pre_hook,
        everywhere.register_module_full_backward_hook, everywhere.register_module_full_backward_pre_hook,
    ):  # fmt: skip
        heard = []
        for module in both:
            calls: list[str] = []
            handle = register(lambda one, *_, calls=calls: calls.append(type(one).__name__))
            try:
                step(module, x)
            finally:
                handle.remove()
            heard.append(sorted(calls))
        assert heard[0] == heard[1]


@pytest.mark.parametrize("method", [False, True])
@pytest.mark.parametrize(("layer", "place"), [(layer, place) for layer in PLACES for place in PLACES[layer]])
@pytest.mark.usefixtures("marked")
def test_a_forward_of_somebody_s_on_a_part_runs(decoder: ModuleType, layer: str, place: str, method: bool) -> None:
    *both, x = made(decoder, layer)
    results = []
    for module in both:
        part = module.get_submodule(place)
        forward = part.forward
        part.forward = MethodType(lambda _, y, f=forward: 2 * f(y), part) if method else lambda y, f=forward: 2 * f(y)
        with torch.no_grad():
            without_gradients = module(x)
        results.append({**step(module, x), "without gradients": without_gradients})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("marked")
def test_kernels_of_ours_on_the_parts_are_passed_by(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernelize leaves them, and a copy's, which is bound to the module that it was copied from, is called."""
    _, kernelized = layers(decoder)
    calls = counted(decoder, monkeypatch)
    expected = step(kernelized, values(2, 5, HIDDEN))
    inner = kernelized.layer
    norm, activation = decoder.functions.norm, decoder.functions.activation
    for place, forward in (
        ("mlp", decoder.layers.GatedMLP.forward), ("mlp.act_fn", activation.layers.SiLU.forward),
        ("input_layernorm", norm.layers.RMSNorm.forward), ("post_attention_layernorm", norm.layers.RMSNorm.forward),
    ):  # fmt: skip
        part = inner.get_submodule(place)
        part.forward = forward.__get__(part)
    found = step(kernelized, values(2, 5, HIDDEN))
    assert len(calls) == 2
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for place in ("input_layernorm", "post_attention_layernorm"):
        other = copy.copy(inner.get_submodule(place))
        other._parameters = {"weight": nn.Parameter(torch.zeros(HIDDEN))}
        setattr(inner, place, other)
        torch.testing.assert_close(kernelized(values(2, 5, HIDDEN)), expected["result"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["input_layernorm", "post_attention_layernorm"])
@pytest.mark.usefixtures("marked")
def test_another_norm_in_the_place_of_one_is_called(decoder: ModuleType, place: str) -> None:
    """Put there after the layer has its kernel, and with all that the kernel reads of its own."""
    both, x = layers(decoder), values(2, 5, HIDDEN)
    for layer in both:
        setattr(layer.layer, place, nn.LayerNorm(HIDDEN))
    found, expected = (step(layer, x) for layer in both)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(both[0](x), both[1](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["forward", "__call__"])
@pytest.mark.parametrize("place", ["input_layernorm", "post_attention_layernorm", "mlp"])
@pytest.mark.usefixtures("way", "marked")
def test_a_class_that_comes_from_a_marked_one_with_a_forward_of_its_own_is_called(
    decoder: ModuleType, place: str, method: str
) -> None:
    """It has the mark of the class that it comes from, and is what `mark` and `kernelize` leave alone."""
    both, x = layers(decoder), values(2, 5, HIDDEN)
    for layer in both:
        part = layer.layer.get_submodule(place)
        base = type(part)
        inner = getattr(base, method)
        part.__class__ = type("Other", (base,), {method: lambda self, y, inner=inner: 3 * inner(self, y)})
    found, expected = (step(layer, x) for layer in both)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(both[0](x), both[1](x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("way", "marked")
def test_a_class_that_comes_from_a_marked_one_and_has_its_forward_is_passed_by(
    decoder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FSDP makes them of the model's."""
    _, kernelized = layers(decoder)
    kernelized.layer.mlp.__class__ = type("FSDPLlamaMLP", (LlamaMLP,), {})
    calls = counted(decoder, monkeypatch)
    step(kernelized, values(2, 5, HIDDEN))
    assert len(calls) == 1


class SiLU(nn.Module):
    """Named as one of the activations that the kernels know, and another."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.7 * x)


@pytest.mark.parametrize("layer", MLPS)
@pytest.mark.usefixtures("way")
def test_an_activation_that_has_no_more_than_the_name_is_called(decoder: ModuleType, layer: str) -> None:
    both, x = pair(decoder, layer), values(5, HIDDEN)
    for module in both:
        setattr(module, MLPS[layer][1], SiLU())
    found, expected = (step(module, x) for module in both)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("marked")
def test_a_norm_and_its_sibling_mlp_have_the_activation_that_is_there(decoder: ModuleType) -> None:
    norm, mlp = LlamaRMSNorm(HIDDEN), llama()
    kernel = decoder.layers.RMSNormGatedMLPLayout(norm, mlp)
    forward, x = decoder.layers.RMSNormGatedMLP.forward, values(5, HIDDEN)
    for other in (GELUTanh(), SiLU()):
        mlp.act_fn = other
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                torch.testing.assert_close(forward(kernel, x), mlp(norm(x)), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="the activation is SiLU; expected one of SiLUActivation"):
        decoder.layers.RMSNormGatedMLPLayout(norm, mlp)


class Adapted(nn.Linear):
    """A linear layer that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Named(Tensor):
    """A subclass, which may keep more than its elements."""


def changes() -> dict[str, Callable[[nn.Module], Any]]:
    def adapted(mlp: nn.Module) -> None:
        old = mlp.up_proj
        mlp.up_proj = Adapted(HIDDEN, BETWEEN, bias=False)
        mlp.up_proj.load_state_dict(old.state_dict())

    def unnamed(mlp: nn.Module) -> None:  # as FSDP does: a plain tensor where the parameter was
        weight = mlp.down_proj.weight
        del mlp.down_proj.weight
        mlp.down_proj.weight = weight.detach()

    return {
        "a class of its own": adapted,
        "a parametrization": lambda mlp: parametrizations.weight_norm(mlp.gate_proj),
        "weight_norm of old": lambda mlp: nn.utils.weight_norm(mlp.down_proj),
        "a weight that is no parameter": unnamed,
        "a weight of a class of its own": lambda mlp: setattr(
            mlp.up_proj, "weight", nn.Parameter(mlp.up_proj.weight.detach().as_subclass(Named))
        ),
        "a weight of another dtype": lambda mlp: mlp.double().up_proj.float().double(),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", changes())
def test_what_is_not_plain_is_called(decoder: ModuleType, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair(decoder, "GatedMLP")
    calls = counted(decoder, monkeypatch)
    results = []
    for module in both:
        torch.manual_seed(1)
        changes()[change](module)
        x = values(5, HIDDEN, dtype=next(module.parameters()).dtype).requires_grad_()
        out = module(x)
        results.append(
            [out, *torch.autograd.grad(out.sum(), [x, *(p for p in module.parameters() if p.requires_grad)])]
        )
    assert len(calls) == ("another dtype" in change)
    for got, expected in zip(*results, strict=True):
        assert type(got) is type(expected)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", MLPS)
def test_casts_transforms_and_traces_are_pytorchs(
    decoder: ModuleType, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast, functorch, forward-mode AD, subclasses and jit's traces: the modules are called, and nothing is lost."""
    both, x = pair(decoder, layer), values(3, 5, HIDDEN)
    calls = counted(decoder, monkeypatch)

    def everything(module: nn.Module) -> list[Tensor]:
        weights = dict(module.named_parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = step(module, x)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        assert dual is not None
        by_weights = grad(lambda w: functional_call(module, w, (x,)).square().sum())(weights)
        each = vmap(grad(lambda w, one: functional_call(module, w, (one,)).square().sum()), (None, 0))(weights, x)
        through = jvp(module, (x,), (torch.ones_like(x),))[1]
        traced = torch.jit.trace(module, (x,), check_trace=False)(x)
        return [*cast.values(), dual, *by_weights.values(), *each.values(), through, traced]

    found = [everything(module) for module in both]
    assert calls == []
    for got, expected in zip(*reversed(found), strict=True):
        assert got.dtype == expected.dtype
        assert float((got - expected).norm()) <= 1e-2 * float(
            expected.norm()
        )  # what autocast rounds to bfloat16 decides
    assert isinstance(both[1](x.as_subclass(Named)), Named)
    assert calls == []


@pytest.mark.parametrize("layer", MLPS)
def test_a_backward_under_autocast_is_that_of_a_forward_without(decoder: ModuleType, layer: str) -> None:
    _, kernelized = pair(decoder, layer)
    expected, x = step(kernelized, values(5, HIDDEN)), values(5, HIDDEN).requires_grad_()
    out = kernelized(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.backward(values(*out.shape, seed=9))
    assert torch.equal(x.grad, expected["input"])
    for name, parameter in kernelized.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("layer", MLPS)
def test_of_meta_tensors_it_gives_shape_and_dtype(decoder: ModuleType, layer: str) -> None:
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            expected, got = (
                module.to("meta")(torch.empty(3, HIDDEN, device="meta")) for module in pair(decoder, layer)
            )
        assert (got.is_meta, got.dtype, got.shape) == (True, expected.dtype, expected.shape)


@pytest.mark.parametrize("layer", PLACES)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.usefixtures("marked")
def test_checkpointed_it_gives_the_same_gradients(decoder: ModuleType, layer: str, reentrant: bool) -> None:
    _, kernelized, x = made(decoder, layer)
    expected = step(kernelized, x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kernelized

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    found = step(Checkpointed(), x)
    for name, value in expected.items():
        key = name if name in ("result", "input") else f"inner.{name}"
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", PLACES)
@pytest.mark.usefixtures("marked")
def test_compiles_to_one_graph_with_the_same_gradients_and_exports(decoder: ModuleType, layer: str) -> None:
    _, kernelized, x = made(decoder, layer)
    expected = step(kernelized, x)
    torch._dynamo.reset()
    compiled = torch.compile(kernelized, fullgraph=True, backend="aot_eager")
    for name, value in step(compiled, x).items():
        name = name.removeprefix("_orig_mod.")
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected["result"], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    for strict in (True, False) if layer == "GatedMLP" else (False,):
        program = torch.export.export(kernelized, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), expected["result"], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(("layer", "tied"), [*((layer, False) for layer in MLPS), ("GatedMLP", True)])
@pytest.mark.usefixtures("way")
def test_gradients_of_gradients_are_the_models_own(decoder: ModuleType, layer: str, tied: bool) -> None:
    results = []
    for module in pair(decoder, layer, torch.float64, bias=True):
        if tied:
            module.up_proj.weight = module.gate_proj.weight
        x = values(5, HIDDEN, dtype=torch.float64).requires_grad_()
        inner = (x * 2).tanh()
        leaves = [x, *module.parameters()]
        first = torch.autograd.grad(module(inner).square().sum(), leaves, create_graph=True)
        penalty = sum(one.square().sum() for one in first)
        results.append([*first, *torch.autograd.grad(penalty, leaves)])
    for got, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, expected)


def test_gradients_of_gradients_of_frozen_weights_are_refused(decoder: ModuleType) -> None:
    _, kernelized = pair(decoder, "GatedMLP")
    kernelized.requires_grad_(False)
    x = values(5, HIDDEN).requires_grad_()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*unkernelize"):
        torch.autograd.grad(kernelized(x).sum(), x, create_graph=True)
    torch.autograd.grad(kernelized(x).sum(), x)


def test_without_the_ops_it_compiles_too(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    without(decoder, monkeypatch)
    _, kernelized = pair(decoder, "GatedMLP")
    expected = step(kernelized, values(5, HIDDEN))
    torch._dynamo.reset()
    compiled = torch.compile(kernelized, fullgraph=True, backend="aot_eager")
    for name, value in step(compiled, values(5, HIDDEN)).items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_compiled_it_adds_a_product_where_the_other_lies(decoder: ModuleType) -> None:
    """PyTorch's own `addmm_` would be one to a copy."""
    _, kernelized = pair(decoder, "GatedMLP")
    expected = step(kernelized, values(5, HIDDEN))
    found, totals = sums_of_a_compiled(step, kernelized, values(5, HIDDEN))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert len(totals) == 1


@pytest.mark.usefixtures("way")
def test_batched_and_repeated_backwards(decoder: ModuleType) -> None:
    original, kernelized = pair(decoder, "GatedMLP")
    x = values(5, HIDDEN).requires_grad_()
    for module in (original, kernelized):
        y = module(x)
        seeds = torch.stack([values(5, HIDDEN, seed=seed) for seed in (1, 2)])
        once = [torch.autograd.grad(y, x, seed, retain_graph=True)[0] for seed in seeds]
        (batched,) = torch.autograd.grad(y, x, seeds, is_grads_batched=True)
        torch.testing.assert_close(batched, torch.stack(once), rtol=1e-4, atol=1e-5)


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    dist = torch.distributed
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/group", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.usefixtures("alone", "marked")
def test_sharded_by_fsdp_it_gives_the_same_gradients(decoder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer as one, whose weights are plain while it runs; and the MLP by itself, which then is called."""
    from torch.distributed.fsdp import fully_shard

    original, kernelized = layers(decoder)
    x = values(2, 5, HIDDEN)
    expected = step(original, x)
    calls = counted(decoder, monkeypatch)
    for places in (("layer",), ("layer.mlp", "layer"), ("layer.mlp.up_proj", "layer")):
        sharded = copy.deepcopy(kernelized)
        bound(decoder, "DecoderLayer", sharded.layer)
        for place in places:
            fully_shard(sharded.get_submodule(place))
        found = step(sharded, x)
        for name, value in expected.items():
            got = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
