"""The tables of kernelhub/rotary without compiled ops, and its layers in the place of every class of transformers' that they serve."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kernelprojects import load_noarch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import vmap
from transformers import LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kernelhub.integrations.families import FAMILIES
from kernelhub.layers.contract import compare

rotary = load_noarch("rotary", "_rotary_tables_under_test")
tables, formulas, layers = rotary.tables, sys.modules["_rotary_tables_under_test.formulas"], rotary.layers
HALVES, NEIGHBOURS, PAIRS, IN_FLOAT32 = tables.HALVES, tables.NEIGHBOURS, tables.PAIRS, formulas.IN_FLOAT32

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS: dict[int, dict[str, bool]] = {HALVES: {}, NEIGHBOURS: {"interleaved": True}, PAIRS: {"paired": True}}
SOURCES = Path(transformers.__file__).parent


def frequencies(pairs: int = 32) -> Tensor:
    return 1 / 10000 ** (torch.arange(pairs) / pairs)


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Bit for bit."""
    return all(
        a.dtype == b.dtype and a.requires_grad == b.requires_grad and torch.equal(a, b)
        for a, b in zip(got, expected, strict=True)
    )


# The function


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_against_float64(layout: int, dtype: torch.dtype) -> None:
    """The angle is rounded to float32, the cosine, its product with the scale, and the result."""
    positions = torch.tensor([[0, 1, 2, 3], [7, 1000, 131071, -5]])
    inv_freq = frequencies(5)
    angles = (positions.float()[..., None] * inv_freq).double()
    if layout == HALVES:
        angles = torch.cat((angles, angles), -1)
    if layout == NEIGHBOURS:
        angles = angles.repeat_interleave(2, -1)
    got = rotary.rotary_tables(inv_freq, positions, 1.25, dtype, **LAYOUTS[layout])
    unit = torch.finfo(dtype).eps / 2 + 3 * torch.finfo(torch.float32).eps
    for table, exact in zip(got, (angles.cos(), angles.sin()), strict=True):
        assert table.dtype == dtype
        torch.testing.assert_close(table.double(), exact * 1.25, rtol=0, atol=1.25 * unit)


def test_is_what_apply_rotary_takes() -> None:
    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    positions = torch.arange(7)[None]
    for interleaved in (False, True):
        wide = rotary.rotary_tables(frequencies(8), positions, interleaved=interleaved)
        narrow = rotary.rotary_tables(frequencies(8), positions, paired=True)
        expected = rotary.apply_rotary(q, k, *wide, interleaved=interleaved)
        assert same(rotary.apply_rotary(q, k, *narrow, interleaved=interleaved, rotary_dim=16), expected)


def test_positions_of_any_shape_dtype_and_strides() -> None:
    inv_freq, positions = frequencies(6), torch.arange(24).reshape(2, 3, 4)
    expected = rotary.rotary_tables(inv_freq, positions)
    assert expected[0].shape == (2, 3, 4, 12)
    for dtype in (torch.int32, torch.int16, torch.float32, torch.float64):
        assert same(rotary.rotary_tables(inv_freq, positions.to(dtype)), expected)
    turned = rotary.rotary_tables(inv_freq, positions.transpose(0, 2))
    assert same(turned, tuple(table.transpose(0, 2) for table in expected))
    assert same(rotary.rotary_tables(inv_freq, positions[0, 0]), tuple(table[0, 0] for table in expected))
    assert same(rotary.rotary_tables(inv_freq, positions[:, :0]), tuple(table[:, :0] for table in expected))
    spread = torch.stack((inv_freq, -inv_freq), -1)[:, 0]
    assert same(rotary.rotary_tables(spread, positions), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_to_the_other_16_bits_changes_nothing(layout: int, cast: torch.dtype) -> None:
    for dtype in DTYPES:
        expected = rotary.rotary_tables(frequencies(8), torch.arange(7)[None], 1.25, dtype, **LAYOUTS[layout])
        with torch.autocast("cpu", cast):
            got = rotary.rotary_tables(frequencies(8), torch.arange(7)[None], 1.25, dtype, **LAYOUTS[layout])
        assert same(got, expected)


def test_gradients_of_the_frequencies() -> None:
    inv_freq = frequencies(3).requires_grad_()
    cos, sin = rotary.rotary_tables(inv_freq, torch.arange(4)[None], 0.5)
    (found,) = torch.autograd.grad((cos + 2 * sin).sum(), inv_freq)
    angles = torch.arange(4)[:, None] * inv_freq.detach()
    torch.testing.assert_close(found, (torch.arange(4)[:, None] * (2 * angles.cos() - angles.sin())).sum(0))


# The layers in the place of transformers' classes


def _classes() -> dict[str, list[tuple[str, str, str]]]:
    """The text of a forward -> each class that has it and that a layer here is for: its name, the layer, its module."""
    wanted = {
        name: family.layer
        for family in FAMILIES
        if family.layer in ("RotaryEmbedding", "RotaryEmbeddingByLayerType")
        for name in family.names.split()
    }
    found: dict[str, list[tuple[str, str, str]]] = {}
    for path in sorted(SOURCES.glob("models/*/modeling_*.py")):
        for block in re.finditer(r"^class (\w+)\(.*?(?=^\S|\Z)", path.read_text(), re.M | re.S):
            if block[1] in wanted:
                (cls,) = ast.parse(block[0]).body
                assert isinstance(cls, ast.ClassDef)
                (forward,) = (one for one in cls.body if isinstance(one, ast.FunctionDef) and one.name == "forward")
                source = f"transformers.models.{path.parent.name}.{path.stem}"
                found.setdefault(ast.unparse(forward), []).append((block[1], wanted.pop(block[1]), source))
    assert wanted == {}
    return found


CLASSES = _classes()
LAYERS = {name: layer for classes in CLASSES.values() for name, layer, _ in classes}
# All but those whose tables are halves in x's dtype.
OTHERS = {
    **dict.fromkeys(("Blt", "Cohere2Moe", "Cohere2", "Cohere"), NEIGHBOURS),
    **dict.fromkeys(("GptOss", "OpenAIPrivacyFilter", "DeepseekV4"), PAIRS),
    **dict.fromkeys(
        ("Ernie4_5", "Ernie4_5_Moe", "FlexOlmo", "Olmo2", "OlmoHybrid", "Olmo", "Olmo3", "Beam"), HALVES | IN_FLOAT32
    ),
}


def made(cls: type[nn.Module], pairs: int = 6, scale: float = 1.25, rope_type: str = "default") -> nn.Module:
    """An instance with what a forward reads, without what a constructor needs. Its kind of layers is "a"."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    inv_freq = frequencies(pairs)
    for prefix in ("", "a_"):
        module.register_buffer(f"{prefix}inv_freq", inv_freq.clone(), persistent=False)
        setattr(module, f"{prefix}attention_scaling", scale)
    module.rope_type = {"a": rope_type} if LAYERS[cls.__name__] == "RotaryEmbeddingByLayerType" else rope_type
    return module


class counted:
    """Counts how often the tables are made here."""

    def __enter__(self) -> list[int]:
        rotary.formulas.of_tables(LlamaRotaryEmbedding)  # which is found out once, by making tables
        self.calls: list[int] = []
        self.function = tables.tables

        def function(*arguments: Any) -> tuple[Tensor, Tensor]:
            self.calls.append(1)
            return self.function(*arguments)

        tables.tables = function
        return self.calls

    def __exit__(self, *_: object) -> None:
        tables.tables = self.function


def as_kernelized(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    kernel = getattr(layers, LAYERS[type(module).__name__])
    formulas.of_tables(type(module))  # asked now: that is not to be counted
    return kernel.forward.__get__(module)


def test_they_are_as_many_as_the_documentation_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()
    assert f"for the {len(LAYERS)} classes whose tables" in " ".join(text.split())


@pytest.mark.parametrize("classes", CLASSES.values(), ids=lambda classes: classes[0][0])
def test_each_class_is_given_its_own_tables(classes: list[tuple[str, str, str]]) -> None:
    """Bit for bit, at lengths that end within, at and behind the vectors that PyTorch's cosine computes at once.

    Of those with one text, one: to import all of transformers takes longer than all else here.
    """
    name, layer, source = classes[0]
    cls, kernel = getattr(importlib.import_module(source), name), getattr(layers, layer)
    assert {one for _, one, _ in classes} == {layer}
    assert compare(kernel, kernel.forward, cls).problems == ()
    known = {OTHERS.get(one.removesuffix("RotaryEmbedding"), HALVES) for one, _, _ in classes}
    assert known == {formulas.of_tables(cls)}
    rest = ("a",) if layer == "RotaryEmbeddingByLayerType" else ()
    for (pairs, tokens), dtype in itertools.product(((6, 5), (32, 1), (32, 33), (64, 700)), DTYPES):
        module = made(cls, pairs)
        x, positions = torch.zeros(1, tokens, 4, dtype=dtype), torch.arange(131072 - tokens, 131072)[None]
        with counted() as calls:
            got = as_kernelized(module)(x, positions, *rest)
        assert len(calls) == 1
        assert same(got, cls.forward(module, x, positions, *rest)), (pairs, tokens, dtype)
        assert [table.stride() for table in got] == [
            table.stride() for table in cls.forward(module, x, positions, *rest)
        ]


def llama(**options: Any) -> LlamaRotaryEmbedding:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 32}
    return LlamaRotaryEmbedding(LlamaConfig(**sizes, **options))


X, POSITIONS = torch.zeros(2, 5, 64), torch.arange(10).reshape(2, 5)


def test_positions_expanded_of_32_bits_and_of_another_dimension() -> None:
    module = llama()
    forward = as_kernelized(module)
    for positions in (
        POSITIONS[:1],
        POSITIONS[:1].expand(2, -1),
        POSITIONS.int(),
        POSITIONS[0],
        POSITIONS[None],
        POSITIONS.repeat_interleave(2, -1)[:, ::2],
        POSITIONS[:, :0],
        2**24 + 1 + POSITIONS * 2**36,  # to the nearest float32, as by itself
    ):
        with counted() as calls:
            assert same(forward(X, position_ids=positions), module(X, position_ids=positions))
        assert len(calls) == 1


def test_frequencies_that_were_cast_with_the_model() -> None:
    module = llama().bfloat16()
    assert module.inv_freq.dtype is torch.bfloat16
    with counted() as calls:
        assert same(as_kernelized(module)(X.bfloat16(), POSITIONS), module(X.bfloat16(), POSITIONS))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}],
    ids=lambda one: one["rope_type"],
)
def test_rope_types_whose_frequencies_stay(rope: dict[str, Any]) -> None:
    module = llama(rope_parameters={**rope, "rope_theta": 10000.0})
    with counted() as calls:
        assert same(as_kernelized(module)(X, POSITIONS), module(X, POSITIONS))
    assert len(calls) == 1
    assert (module.attention_scaling == 1) is (rope["rope_type"] == "linear")


def test_dynamic_frequencies_are_computed_anew() -> None:
    """By the class's forward, which also keeps count of the longest."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    module, expected = llama(rope_parameters=rope), llama(rope_parameters=rope)
    forward, first = as_kernelized(module), module.inv_freq.clone()
    for last in (40, 20):  # longer than what the model was trained for, and shorter again
        positions = torch.arange(last)[None]
        with counted() as calls:
            assert same(forward(X, positions), expected(X, positions))
        assert calls == []
        assert torch.equal(module.inv_freq, expected.inv_freq)
        assert torch.equal(module.inv_freq, first) is (last == 20)


def test_longrope_chooses_its_frequencies_by_the_positions() -> None:
    factors = {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **factors}
    module, expected = llama(rope_parameters=rope), llama(rope_parameters=rope)
    for last in (10, 20):
        positions = torch.arange(last)[None]
        with counted() as calls:
            assert same(as_kernelized(module)(X, positions), expected(X, positions))
        assert calls == []


def test_what_is_read_is_read_at_every_call() -> None:
    """The rope type, too: `unfit` saw another one."""
    module = llama()
    forward = as_kernelized(module)
    forward(X, POSITIONS)
    module.inv_freq, module.attention_scaling = module.inv_freq * 2, 3.0
    assert same(forward(X, POSITIONS), LlamaRotaryEmbedding.forward(module, X, POSITIONS))
    module.rope_type = "dynamic"
    with counted() as calls:
        assert same(forward(X, POSITIONS), LlamaRotaryEmbedding.forward(module, X, POSITIONS))
    assert calls == []


def test_kinds_of_layers_have_frequencies_of_their_own() -> None:
    """One of them is dynamic, which is the class's."""
    module = made(Gemma3RotaryEmbedding)
    module.register_buffer("b_inv_freq", frequencies(8) / 8)
    module.b_attention_scaling, module.rope_type = 2.0, {"a": "default", "b": "linear"}
    forward = as_kernelized(module)
    for kind in ("a", "b"):
        assert same(forward(X, POSITIONS, kind), module(X, POSITIONS, kind))
    assert not same(forward(X, POSITIONS, "a"), forward(X, POSITIONS, "b"))
    module.rope_type["b"], module.max_seq_len_cached, module.original_max_seq_len = "dynamic", 64, 64
    module.b_original_inv_freq = module.b_inv_freq
    with counted() as calls:
        assert same(forward(X, POSITIONS, "b"), module(X, POSITIONS, "b"))
        assert same(forward(X, POSITIONS, "a"), module(X, POSITIONS, "a"))
    assert len(calls) == 1
    for kind in ("c", None):
        with pytest.raises((KeyError, TypeError)) as expected:
            module(X, POSITIONS, kind)
        with pytest.raises(expected.type):
            forward(X, POSITIONS, kind)


class Named(Tensor):
    """A subclass, which may keep more than its elements."""


def unusual() -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    yield "x is a subclass", llama(), X.as_subclass(Named), POSITIONS
    yield "positions are a subclass", llama(), X, POSITIONS.as_subclass(Named)
    yield "float64", llama(), X.double(), POSITIONS
    yield "positions are floating", llama(), X, POSITIONS.float()
    module = llama()
    module.inv_freq = nn.Parameter(module.inv_freq)
    yield "frequencies have a gradient", module, X, POSITIONS
    module = llama()
    module.inv_freq = module.inv_freq.double()
    yield "frequencies of 64 bits", module, X, POSITIONS
    module = llama()
    module.inv_freq = module.inv_freq.as_subclass(Named)
    yield "frequencies are a subclass", module, X, POSITIONS
    module = llama()
    module.attention_scaling = torch.tensor(1.5)
    yield "the scale is a tensor", module, X, POSITIONS
    module = llama()
    module.inv_freq = module.inv_freq[None]
    yield "frequencies of two dimensions", module, X, POSITIONS


@pytest.mark.parametrize(("module", "x", "positions"), [pytest.param(*rest, id=name) for name, *rest in unusual()])
def test_what_is_not_as_a_model_has_it_is_the_classs_own(module: nn.Module, x: Tensor, positions: Tensor) -> None:
    with counted() as calls:
        got = as_kernelized(module)(x, positions)
    assert calls == []
    expected = LlamaRotaryEmbedding.forward(module, x, positions)
    assert [type(table) for table in got] == [type(table) for table in expected]
    assert same(got, expected)


def test_frequencies_on_another_device_than_x_are_the_classs_own() -> None:
    with counted() as calls:
        got = as_kernelized(llama())(X.to("meta"), POSITIONS.to("meta"))
        assert {table.device.type for table in got} == {"meta"}
        with pytest.raises(RuntimeError):
            as_kernelized(llama())(X.to("meta"), POSITIONS)
    assert calls == []


def test_transforms_and_fake_tensors_are_the_classs_own() -> None:
    module = llama()
    forward = as_kernelized(module)
    with counted() as calls:
        got = vmap(lambda positions: torch.stack(forward(X, positions)))(POSITIONS[:, None])
        torch.testing.assert_close(got, torch.stack(module(X, POSITIONS), 1)[:, :, None], rtol=0, atol=0)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            cos, _ = forward(mode.from_tensor(X), mode.from_tensor(POSITIONS))
            assert cos.shape == (2, 5, 16)
        with forward_ad.dual_level():
            module.inv_freq = forward_ad.make_dual(module.inv_freq, torch.ones(8))
            assert forward_ad.unpack_dual(forward(X, POSITIONS)[0]).tangent is not None
    assert calls == []


def test_compiles_to_one_graph_before_it_was_ever_called() -> None:
    class Fresh(LlamaRotaryEmbedding):
        """A class that nothing has asked yet."""

    module = Fresh(llama().config)
    expected = llama()
    module.forward = layers.RotaryEmbedding.forward.__get__(module)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (5, 9):
        x, positions = torch.zeros(2, tokens, 4, dtype=torch.bfloat16), torch.arange(tokens)[None]
        assert same(compiled(x, positions), expected(x, positions))
    assert counter.frame_count == 1
    assert formulas._known_tables[Fresh][1] == HALVES


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict: bool) -> None:
    module = llama()
    module.forward = as_kernelized(module)
    traced = torch.export.export(module, (X, POSITIONS), strict=strict).module()
    assert same(traced(X, POSITIONS + 1), LlamaRotaryEmbedding.forward(module, X, POSITIONS + 1))


# Classes that are none of them


class _Twice(LlamaRotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().forward(x, position_ids)
        return cos * 2, sin


class _Wide(LlamaRotaryEmbedding):
    """As all of them but for bfloat16."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.double() if x.dtype is torch.bfloat16 else x, position_ids)


class _Reads(LlamaRotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, position_ids + self.max_seq_len_cached)


@pytest.mark.parametrize("cls", [_Twice, _Wide, _Reads], ids=lambda cls: cls.__name__)
def test_another_formula_runs_itself(cls: type[LlamaRotaryEmbedding]) -> None:
    assert formulas.of_tables(cls) == formulas.UNKNOWN
    module, x = cls(llama().config), X.bfloat16()
    with counted() as calls:
        got = layers.RotaryEmbedding.forward(module, x, POSITIONS)
    assert calls == []
    assert same(got, module(x, POSITIONS))


def test_a_class_can_be_asked_while_tensors_have_no_values() -> None:
    with FakeTensorMode():
        assert formulas.of_tables(type("Fresh", (LlamaRotaryEmbedding,), {})) == HALVES


def test_a_class_is_asked_once() -> None:
    class Counting(LlamaRotaryEmbedding):
        asked = 0

        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            Counting.asked += 1
            return LlamaRotaryEmbedding.forward(self, x, position_ids)

    module = Counting(llama().config)
    forward = layers.RotaryEmbedding.forward.__get__(module)
    forward(X, POSITIONS)
    first = Counting.asked
    forward(X, POSITIONS)
    assert Counting.asked == first > 0


def test_a_class_that_somebody_gave_another_forward_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fresh(LlamaRotaryEmbedding):
        pass

    module = Fresh(llama().config)
    forward = layers.RotaryEmbedding.forward.__get__(module)
    assert same(forward(X, POSITIONS), module(X, POSITIONS))
    held = Fresh.forward

    def other(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = held(self, x, position_ids)
        return 2 * cos, sin

    monkeypatch.setattr(Fresh, "forward", other)
    got = forward(X, POSITIONS)
    assert same(got, module(X, POSITIONS))
    assert torch.equal(got[0], 2 * held(module, X, POSITIONS)[0])


def test_called_for_itself() -> None:
    alone = layers.RotaryEmbedding()
    alone.inv_freq, alone.attention_scaling = frequencies(8), 1.0
    assert same(alone(X, POSITIONS), rotary.rotary_tables(alone.inv_freq, POSITIONS))


def test_the_layers_have_nothing_but_what_the_contract_allows() -> None:
    for layer in (layers.RotaryEmbedding, layers.RotaryEmbeddingByLayerType):
        members = {member for member in vars(layer) if not (member.startswith("__") and member.endswith("__"))}
        assert members == {"forward", "can_torch_compile", "has_backward"}


def test_layouts_are_numbered_as_in_the_kernels() -> None:
    root = Path(__file__).parents[2] / "kernels" / "rotary" / "rotary_cuda"
    text = (root / "launch.h").read_text() + (root / "device.h").read_text()
    numbers = dict(re.findall(r"\b([A-Z][A-Z0-9]+) = (\d+)", text))
    assert {name: int(numbers[name]) for name in ("HALVES", "NEIGHBOURS", "PAIRS")} == {
        "HALVES": HALVES, "NEIGHBOURS": NEIGHBOURS, "PAIRS": PAIRS,
    }  # fmt: skip
    assert {str(dtype): number for dtype, number in tables._DTYPES.items()} == {
        f"torch.{name.lower()}": int(numbers[name]) for name in ("FLOAT32", "BFLOAT16", "FLOAT16")
    }
