"""kernelhub/loss, in PyTorch and compiled, on each level of instructions: against transformers' own loss and float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from kernelprojects import load_compiled, load_noarch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import ForCausalLMLoss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = {"plain": 0, "avx2": 1, "avx512": 2}
REDUCTIONS = ("mean", "sum", "none")
OPTIONS = ({}, {"label_smoothing": 0.1}, {"z_loss": 1e-3}, {"label_smoothing": 0.2, "z_loss": 1e-2})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Hundreds of small operations: with others at work on the same cores, each would wait for the other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("loss", request.config, "cpu")


@pytest.fixture(scope="session")
def noarch() -> ModuleType:
    return load_noarch("loss", "_loss_under_test")


@pytest.fixture(params=["noarch", "compiled"])
def loss(request: pytest.FixtureRequest) -> ModuleType:
    """Both builds."""
    module = request.getfixturevalue(request.param)
    assert (request.param == "compiled") == module.functions.compiled.HERE
    return module


@pytest.fixture(params=["noarch", *LEVELS])
def each(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Both builds, the compiled one on each level that this processor has."""
    if request.param == "noarch":
        yield request.getfixturevalue("noarch")
        return
    module, wanted = request.getfixturevalue("compiled"), LEVELS[request.param]
    use_level = module.functions.compiled.ops.use_level
    try:
        if use_level(wanted) != wanted:
            pytest.skip(f"this processor has no {request.param}")
        yield module
    finally:
        use_level(2)


@pytest.fixture
def in_parts(loss: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A few rows at a time, also of small inputs."""
    monkeypatch.setattr(loss.functions.parts, "_ON_CPU", 200)
    monkeypatch.setattr(loss.functions.projection, "rows_together", lambda features, classes: 3)
    return loss


def formula(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """The mathematics, written out, in the dtype of the logits."""
    most = logits.detach().amax(-1)
    log_sum = (logits - most[..., None]).exp().sum(-1).log() + most
    kept = labels != -100
    nll = log_sum - logits.gather(-1, labels.where(kept, 0)[..., None])[..., 0]
    rows = (1 - label_smoothing) * nll + label_smoothing * (log_sum - logits.mean(-1)) + z_loss * log_sum**2
    rows = rows.where(kept, 0.0)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / kept.sum()}[reduction]


def eager(logits: Tensor, labels: Tensor, z_loss: float = 0.0, reduction: str = "mean", **options: float) -> Tensor:
    """What is computed today, in float32."""
    wide = logits.float().reshape(-1, logits.shape[-1])
    rows = F.cross_entropy(wide, labels.reshape(-1), reduction="none" if z_loss else reduction, **options)
    if z_loss:
        kept = labels.reshape(-1) != -100
        rows = rows + z_loss * torch.logsumexp(wide, -1) ** 2 * kept
        if reduction != "none":
            rows = rows.sum() / (kept.sum() if reduction == "mean" else 1)
    return rows.reshape(labels.shape) if reduction == "none" else rows


def problem(
    rows: int, classes: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[1::4] = -100
    return logits.requires_grad_(), labels


def projected(
    rows: int, features: int, classes: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[list[Tensor], Tensor]:
    """hidden, weight and bias, and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        (torch.randn(shape, generator=generator) * factor).to(dtype).requires_grad_()
        for shape, factor in (((rows, features), scale), ((classes, features), features**-0.5), ((classes,), 0.1))
    )
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[1::4] = -100
    return [hidden, weight, bias], labels


def separate(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, **options: object) -> Tensor:
    return eager(F.linear(hidden, weight, bias), labels, **options)


def seed_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)


def error(got: Tensor, reference: Tensor) -> float:
    return float((got.double() - reference.double()).detach().abs().max())


def allowed(eager: Tensor, reference: Tensor) -> float:
    """Twice the eager error, and a unit of rounding of the largest value, for where eager happens to be exact.

    Of many elements some are not, so that half a unit is enough; a single one may be.
    """
    unit = torch.finfo(eager.dtype).eps * float(reference.detach().abs().max()) / (4 if eager.dim() else 1)
    return 2 * error(eager, reference) + unit


# Numerics


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_in_float64_it_is_the_formula(in_parts: ModuleType, options: dict, reduction: str) -> None:
    logits, labels = problem(9, 41, torch.float64)
    got = in_parts.cross_entropy(logits, labels, reduction=reduction, **options)
    expected = formula(logits, labels, reduction=reduction, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    seed = seed_of(expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, logits, seed), torch.autograd.grad(expected, logits, seed), rtol=1e-11, atol=1e-12
    )
    operands, labels = projected(10, 8, 23, torch.float64)
    got = in_parts.linear_cross_entropy(*operands[:2], labels, operands[2], reduction=reduction, **options)
    expected = formula(F.linear(*operands), labels, reduction=reduction, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    seed = seed_of(expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, operands, seed), torch.autograd.grad(expected, operands, seed), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_at_most_twice_as_far_from_float64_as_the_models_own_code(each: ModuleType, dtype: torch.dtype) -> None:
    """The loss and its gradient, over widths, scales, reductions and options. needs 7: numerics drift."""
    cases = itertools.product((5, 64, 2048, 5003), (1e-3, 1.0, 50.0), REDUCTIONS, OPTIONS)
    for classes, scale, reduction, options in cases:
        logits, labels = problem(13, classes, dtype, scale)
        wide = logits.detach().double().requires_grad_()
        reference = formula(wide, labels, reduction=reduction, **options)
        eagerly = eager(logits, labels, reduction=reduction, **options)
        got = each.cross_entropy(logits, labels, reduction=reduction, **options)
        assert got.dtype is torch.float32
        assert error(got, reference) <= allowed(eagerly, reference), (classes, scale, reduction, options)
        seed = seed_of(eagerly)
        ways = ((reference, wide), (eagerly, logits), (got, logits))
        exact, theirs, ours = (torch.autograd.grad(out, x, seed.to(out.dtype))[0] for out, x in ways)
        assert ours.dtype is dtype
        assert error(ours, exact) <= allowed(theirs, exact), (classes, scale, reduction, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("together", [16, 64])
def test_the_projection_too(
    loss: ModuleType, dtype: torch.dtype, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the weight's gradient is a sum over many parts."""
    monkeypatch.setattr(loss.functions.projection, "rows_together", lambda features, classes: together)
    monkeypatch.setattr(loss.functions.projection, "_CLASSES", 200)
    for scale, reduction, options in itertools.product((1e-2, 1.0, 20.0), REDUCTIONS, OPTIONS[:2]):
        operands, labels = projected(64, 48, 501, dtype, scale)
        wide = [x.detach().double().requires_grad_() for x in operands]
        reference = formula(F.linear(*wide), labels, reduction=reduction, **options)
        eagerly = separate(*operands, labels, reduction=reduction, **options)
        got = loss.linear_cross_entropy(*operands[:2], labels, operands[2], reduction=reduction, **options)
        assert got.dtype is torch.float32
        assert error(got, reference) <= allowed(eagerly, reference), (scale, reduction, options)
        seed = seed_of(eagerly)
        ways = ((reference, wide), (eagerly, operands), (got, operands))
        gradients = [torch.autograd.grad(out, x, seed.to(out.dtype)) for out, x in ways]
        for name, exact, theirs, ours in zip(("hidden", "weight", "bias"), *gradients, strict=True):
            assert ours.dtype is dtype
            assert error(ours, exact) <= allowed(theirs, exact), (name, scale, reduction, options)


def test_small_gradients_in_float16_do_not_underflow(in_parts: ModuleType) -> None:
    """A gradient scaler multiplies the loss by 65536 for their sake: it must reach them before they are rounded."""
    operands, labels = projected(64, 48, 5001, torch.float16)
    expected = torch.autograd.grad(separate(*operands, labels) * 65536, operands)
    got = torch.autograd.grad(in_parts.linear_cross_entropy(*operands[:2], labels, operands[2]) * 65536, operands)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=2e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_zeros_tiny_huge_and_non_finite_values(each: ModuleType, dtype: torch.dtype, label_smoothing: float) -> None:
    infinity, classes = float("inf"), 4100  # three blocks of a row
    finfo = torch.finfo(dtype)
    rows = torch.randn(14, classes).to(dtype)
    rows[0] = 0
    rows[1] *= finfo.tiny
    rows[2] = finfo.max
    rows[3] = finfo.min
    rows[4, ::2] = finfo.min
    rows[4, 1::2] = finfo.max
    rows[5, 3] = infinity
    rows[6, 4099] = -infinity
    rows[7, 2100] = float("nan")
    rows[8] = -infinity
    rows[9, :3000] = -infinity  # the first block is nothing else
    rows[10, :3000] = -infinity
    rows[10, 17] = float("nan")
    rows[11] *= 1e4
    rows[12] = -infinity
    rows[12, 4099] = 0.0
    rows[13, 0] = -infinity
    logits, labels = rows.requires_grad_(), torch.zeros(14, dtype=torch.int64)
    labels[9] = labels[12] = 4099
    expected = eager(logits, labels, label_smoothing=label_smoothing, reduction="none")
    got = each.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=2e-6, atol=1e-6)
    ones = torch.ones_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, logits, ones), torch.autograd.grad(expected, logits, ones), equal_nan=True
    )


def test_ignored_rows_are_not_read(loss: ModuleType) -> None:
    logits = torch.full((3, 7), float("nan"), requires_grad=True)
    labels = torch.tensor([-100, -100, -100])
    got = loss.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1, z_loss=0.1)
    assert got == 0
    assert torch.equal(torch.autograd.grad(got, logits)[0], torch.zeros(3, 7))


def test_nothing_but_ignored_labels_is_what_it_is_in_pytorch(in_parts: ModuleType) -> None:
    operands, labels = projected(5, 4, 7)
    labels[:] = 3
    logits = torch.randn(5, 7, requires_grad=True)
    for of in (
        in_parts.cross_entropy(logits, labels, ignore_index=3),
        in_parts.linear_cross_entropy(*operands[:2], labels, ignore_index=3),
    ):
        assert of.isnan()
    assert torch.equal(
        torch.autograd.grad(in_parts.cross_entropy(logits, labels, ignore_index=3), logits)[0], torch.zeros(5, 7)
    )
    got = torch.autograd.grad(in_parts.linear_cross_entropy(*operands[:2], labels, ignore_index=3), operands[:2])
    expected = torch.autograd.grad(separate(*operands[:2], None, labels, ignore_index=3), operands[:2])
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


# Shapes and gradients


def views(x: Tensor) -> list[Tensor]:
    """x, (4, 6, 96), by other strides, and parts of it."""
    return [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x[:, ::2],
        x[:, :-1],
        x.repeat(1, 1, 3)[:, :, 96:192],
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        x[:, :1].expand(4, 6, 96),
        x.repeat_interleave(2, dim=2)[:, :, ::2],
        x[0, 0],
        x[:, :0],
        x[:0],
    ]


def test_any_shape_any_strides_and_nothing(in_parts: ModuleType) -> None:
    base, everything = torch.randn(4, 6, 96), torch.randint(0, 96, (4, 6, 2))[..., 0]
    for view in views(base):
        logits = view.detach().requires_grad_()
        dense = logits.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        labels = everything[tuple(slice(size) for size in logits.shape[:-1])] if logits.dim() > 1 else everything[0, 0]
        got = in_parts.cross_entropy(logits, labels, reduction="none")
        expected = eager(dense, labels, reduction="none")
        assert got.shape == labels.shape
        torch.testing.assert_close(got, expected)
        seed = torch.randn(()).expand(labels.shape)
        torch.testing.assert_close(torch.autograd.grad(got, logits, seed), torch.autograd.grad(expected, dense, seed))
        assert in_parts.cross_entropy(logits, labels).isnan() == (labels.numel() == 0)
        weight, bias = torch.randn(11, 96, requires_grad=True), torch.randn(22, requires_grad=True)[::2]
        few = labels % 11
        found = in_parts.linear_cross_entropy(logits, weight, few, bias, reduction="none")
        expected = separate(dense, weight, bias, few, reduction="none")
        torch.testing.assert_close(found, expected)
        mean = in_parts.linear_cross_entropy(logits, weight, few, bias, reduction="sum")
        assert mean.shape == ()
        torch.testing.assert_close(
            torch.autograd.grad(mean, [logits, weight, bias]),
            torch.autograd.grad(expected.sum(), [dense, weight, bias]),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_only_some_operands_require_a_gradient(in_parts: ModuleType, wanted: tuple[int, ...], reduction: str) -> None:
    """A frozen head, or nothing but a head."""
    operands, labels = projected(10, 8, 23)
    operands = [x.detach().requires_grad_(position in wanted) for position, x in enumerate(operands)]
    leaves = [operands[position] for position in wanted]
    got = in_parts.linear_cross_entropy(*operands[:2], labels, operands[2], reduction=reduction)
    expected = separate(*operands, labels, reduction=reduction)
    seed = seed_of(expected)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, seed), torch.autograd.grad(expected, leaves, seed))


def test_no_gradient_is_made_where_none_is_asked_for(in_parts: ModuleType) -> None:
    operands, labels = projected(10, 8, 23)
    logits, own = problem(5, 7)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not in_parts.cross_entropy(logits, own).requires_grad
            assert not in_parts.linear_cross_entropy(*operands[:2], labels).requires_grad
            torch.testing.assert_close(in_parts.cross_entropy(logits, own), eager(logits, own))
            torch.testing.assert_close(
                in_parts.linear_cross_entropy(*operands[:2], labels), separate(*operands[:2], None, labels)
            )
    plain = [x.detach() for x in operands]
    assert not in_parts.linear_cross_entropy(*plain[:2], labels, plain[2]).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_twice_through_one_graph(in_parts: ModuleType, dtype: torch.dtype) -> None:
    """The gradients that are kept are scaled in place only when nobody can ask for them again."""
    operands, labels = projected(10, 8, 23, dtype)
    out = in_parts.linear_cross_entropy(*operands[:2], labels, operands[2])
    first = torch.autograd.grad(out, operands, torch.tensor(0.7), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(out, operands, torch.tensor(0.7), retain_graph=True)
    third = torch.autograd.grad(out, operands, torch.tensor(1.4))
    for a, b, c, d in zip(first, kept, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        torch.testing.assert_close(d, 2 * a)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, operands)


def test_a_second_derivative_is_refused(loss: ModuleType) -> None:
    operands, labels = projected(10, 8, 23)
    logits, own = problem(5, 7)
    for out, leaf in (
        (loss.cross_entropy(logits, own), logits),
        (loss.linear_cross_entropy(*operands[:2], labels), operands[0]),
        (loss.linear_cross_entropy(*operands[:2], labels, reduction="none").sum(), operands[0]),
    ):
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.sum().backward()
        assert leaf.grad is None
    for out, leaf in (  # where other ways lead to what gradients are asked for by
        (loss.cross_entropy(logits, own), logits),
        (loss.linear_cross_entropy(*operands[:2], labels), operands[0]),
        (loss.linear_cross_entropy(*operands[:2], labels), operands[1]),
        (loss.linear_cross_entropy(*operands[:2], labels, reduction="none").sum(), operands[0]),
    ):
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(first.sum() + leaf.sum(), leaf)


def test_operands_are_not_written_to(in_parts: ModuleType) -> None:
    operands, labels = projected(10, 8, 23)
    logits, own = problem(5, 7)
    everything = [*operands, labels, logits, own]
    before = [(x.detach().clone(), x._version) for x in everything]
    in_parts.cross_entropy(logits, own).backward()
    in_parts.linear_cross_entropy(*operands[:2], labels, operands[2]).backward()
    for x, (value, version) in zip(everything, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_projects_in_its_dtype(in_parts: ModuleType, dtype: torch.dtype) -> None:
    operands, labels = projected(10, 8, 23)
    found = []
    for way in (
        lambda: in_parts.linear_cross_entropy(*operands[:2], labels, operands[2]),
        lambda: separate(*operands, labels),
    ):
        with torch.autocast("cpu", dtype):
            out = way()
        assert out.dtype is torch.float32
        found.append([out, *torch.autograd.grad(out, operands)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2 * float(theirs.abs().max()))
    exact = separate(*operands, labels)
    assert error(found[0][0], found[1][0]) < error(exact, found[1][0])


def test_of_meta_tensors_it_gives_shape_and_dtype(in_parts: ModuleType) -> None:
    hidden, weight, labels = torch.randn(5, 8), torch.randn(7, 8), torch.randint(7, (5,))
    hidden, weight, labels = (x.to("meta") for x in (hidden.requires_grad_(), weight, labels))
    for reduction, shape in (("mean", ()), ("none", (5,))):
        for got in (
            in_parts.cross_entropy(F.linear(hidden, weight), labels, reduction=reduction),
            in_parts.linear_cross_entropy(hidden, weight, labels, reduction=reduction),
        ):
            assert (got.is_meta, got.dtype, got.shape) == (True, torch.float32, shape)


# Memory


def peak(way: Callable[[], object]) -> int:
    """The most bytes that PyTorch allocates at a time while `way` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_projection_never_has_all_logits_in_memory(
    loss: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss.functions.projection, "_FEW", 0)
    monkeypatch.setattr(loss.functions.parts, "_ON_CPU", 1 << 16)
    monkeypatch.setattr(loss.functions.projection, "_CLASSES", 500)
    rows, features, classes = 1024, 32, 4000
    operands, labels = projected(rows, features, classes, dtype)
    size = operands[0].element_size()
    all_logits, part, gradients = rows * classes * size, features * classes * size, (rows + classes) * features * size
    with torch.no_grad():
        most = peak(lambda: loss.linear_cross_entropy(*operands[:2], labels))
    assert all_logits / 100 < most <= part + 3 * 4 * (1 << 16) + 20_000  # a check of the counting, too
    most = peak(lambda: loss.linear_cross_entropy(*operands[:2], labels).backward())
    summed = 4 * features * classes if dtype is torch.bfloat16 else 0  # the weight's gradient in float32
    assert most <= part + gradients + summed + 3 * 4 * (1 << 16) + 100_000
    assert most < all_logits
    assert peak(lambda: separate(*operands[:2], None, labels).backward()) > 3 * all_logits


def test_the_logits_are_freed_before_there_is_a_second_copy_of_the_weights_gradient(
    loss: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits the logits of a part take as much as the gradient, and the sum it is rounded from twice as much."""
    monkeypatch.setattr(loss.functions.projection, "_FEW", 0)
    monkeypatch.setattr(loss.functions.projection, "_CLASSES", 100)
    monkeypatch.setattr(loss.functions.parts, "_ON_CPU", 4000)
    operands, labels = projected(320, 80, 4000, torch.bfloat16)
    hidden, weight = (2 * operand.numel() for operand in operands[:2])
    most = peak(lambda: loss.linear_cross_entropy(*operands[:2], labels).backward())
    assert 3 * weight <= most <= 3.4 * weight + hidden


def test_parts_are_of_about_the_same_size(noarch: ModuleType) -> None:
    rows = noarch.functions.projection._rows
    found = [rows(8192, 2048), rows(8193, 2048), rows(2049, 2048), rows(200, 100), rows(7, 3), rows(2, 3), rows(1, 1)]
    assert found == [2048, 1664, 1088, 100, 3, 2, 1]
    for count, most in itertools.product(range(300), range(1, 200, 7)):
        found = rows(count, most)
        assert found <= min(most, count)
        assert -(-count // max(found, 1)) == -(-count // most), "no more parts than there need be"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_in_new_memory_does_not_reach_the_weights_gradient(
    in_parts: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    operands, labels = projected(10, 8, 23, dtype)
    plain = in_parts.linear_cross_entropy(*operands[:2], labels, operands[2])
    expected = torch.autograd.grad(plain, operands)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        found = in_parts.linear_cross_entropy(*operands[:2], labels, operands[2])
        got = torch.autograd.grad(found, operands)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, plain)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_is_no_float32_copy_of_the_logits(
    loss: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss.functions.parts, "_ON_CPU", 1 << 16)
    logits, labels = problem(512, 4000, dtype)
    size = logits.numel() * logits.element_size()
    with torch.no_grad():
        assert peak(lambda: loss.cross_entropy(logits, labels)) < 3 * 4 * (1 << 16) + 20_000
    assert peak(lambda: loss.cross_entropy(logits, labels).backward()) < size + 3 * 4 * (1 << 16) + 20_000
    logits.grad = None
    assert peak(lambda: eager(logits, labels).backward()) > 2 * size


def test_rows_whose_logits_are_there_together(noarch: ModuleType) -> None:
    rows_together = noarch.functions.projection.rows_together
    assert rows_together(2048, 128256) == 2048
    assert rows_together(64, 128256) == 130
    assert rows_together(64, 1 << 30) == 64
    assert rows_together(0, 1 << 30) == 1


# torch.compile, export, transforms


@pytest.mark.parametrize("enabled", [True, False])
def test_compiles_to_one_graph(loss: ModuleType, enabled: bool) -> None:
    counter = CompileCounter()
    torch._dynamo.reset()

    def both(logits: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return loss.cross_entropy(logits, labels) + loss.linear_cross_entropy(hidden, weight, labels)

    compiled = torch.compile(both, fullgraph=True, backend=counter, dynamic=True)
    with torch.set_grad_enabled(enabled):
        for rows in (9, 12):
            logits, labels = problem(rows, 23)
            operands = projected(rows, 8, 23)[0][:2]
            torch.testing.assert_close(compiled(logits, *operands, labels), both(logits, *operands, labels))
    assert counter.frame_count == 1


def test_whether_a_device_has_autocast_is_not_traced(noarch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which torch 2.11's compiler cannot."""
    asked = torch._dynamo.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)
    torch._dynamo.reset()
    compiled = torch.compile(noarch.linear_cross_entropy, fullgraph=True, backend="eager")
    labels = problem(9, 23)[1]
    operands = projected(9, 8, 23)[0][:2]
    torch.testing.assert_close(compiled(*operands, labels), noarch.linear_cross_entropy(*operands, labels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_gradients_are_those_of_eager(in_parts: ModuleType, dtype: torch.dtype, reduction: str) -> None:
    torch._dynamo.reset()
    logits, own = problem(10, 23, dtype)
    operands, labels = projected(10, 8, 23, dtype)

    def both(logits: Tensor, *operands: Tensor) -> Tensor:
        return in_parts.cross_entropy(logits, own, reduction=reduction) + 0.5 * in_parts.linear_cross_entropy(
            *operands[:2], labels, operands[2], reduction=reduction
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found = []
    for way in (both, compiled):
        out = way(logits, *operands)
        found.append([out, *torch.autograd.grad(out, [logits, *operands], seed_of(out))])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_compiled_it_takes_no_more_memory(loss: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss.functions.projection, "_FEW", 0)
    monkeypatch.setattr(loss.functions.parts, "_ON_CPU", 1 << 16)
    torch._dynamo.reset()
    operands, labels = projected(1024, 32, 4000)
    compiled = torch.compile(lambda: loss.linear_cross_entropy(*operands[:2], labels), backend="aot_eager")
    compiled().backward()
    assert peak(lambda: compiled().backward()) < operands[0].shape[0] * 4000 * 4 / 4


@pytest.mark.parametrize("strict", [True, False])
def test_exports(loss: ModuleType, strict: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 23)

        def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
            fused = loss.linear_cross_entropy(hidden, self.head.weight, labels, self.head.bias)
            return fused + loss.cross_entropy(self.head(hidden), labels)

    model, rows = Model(), torch.export.Dim("rows", min=2, max=64)
    arguments = torch.randn(10, 8), torch.randint(0, 23, (10,))
    with torch.no_grad():
        program = torch.export.export(model, arguments, dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
        other = torch.randn(32, 8), torch.randint(0, 23, (32,))
        torch.testing.assert_close(program.module()(*other), model(*other))


@pytest.mark.parametrize("enabled", [True, False])
def test_where_autograd_functions_have_no_rules_pytorch_computes(loss: ModuleType, enabled: bool) -> None:
    """vmap, gradients through it, forward mode with and without functorch: nothing is lost silently."""
    logits = torch.randn(3, 5, 7)
    weight, hidden = torch.randn(7, 4), torch.randn(3, 5, 4)
    labels = torch.randint(0, 7, (5,))

    def several(cross: Callable[..., Tensor], projected: Callable[..., Tensor]) -> list[Tensor]:
        def dual(function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
            with forward_ad.dual_level():
                out = function(forward_ad.make_dual(x, torch.ones_like(x)), *others)
                tangent = forward_ad.unpack_dual(out).tangent
            assert tangent is not None
            return tangent

        ones = torch.ones_like(hidden[0])
        return [
            vmap(lambda x: cross(x, labels))(logits),
            vmap(lambda x: projected(x, weight, labels))(hidden),
            vmap(lambda x: projected(hidden[0], x, labels))(torch.stack([weight, 2 * weight])),
            grad(lambda x: vmap(lambda x: cross(x, labels))(x).square().sum())(logits),
            grad(lambda x: projected(x, weight, labels))(hidden[0]),
            grad(lambda x: grad(lambda x: cross(x, labels))(x).square().sum())(logits[0]),
            jvp(lambda x: projected(x, weight, labels), (hidden[0],), (ones,))[1],
            dual(cross, logits[0], labels),
            dual(projected, hidden[0], weight, labels),
        ]

    with torch.set_grad_enabled(enabled):
        ours = several(loss.cross_entropy, loss.linear_cross_entropy)
        theirs = several(eager, lambda hidden, weight, labels: separate(hidden, weight, None, labels))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("enabled", [True, False])
def test_a_trace_is_pytorchs(loss: ModuleType, enabled: bool) -> None:
    hidden, weight, labels = torch.randn(5, 4), torch.randn(7, 4), torch.randint(0, 7, (5,))

    def both(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return loss.linear_cross_entropy(hidden, weight, labels) + loss.cross_entropy(hidden @ weight.t(), labels)

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with torch.set_grad_enabled(enabled):
        traced = torch.jit.trace(both, (hidden.detach().flip(0).requires_grad_(), weight, labels))
    assert "PythonOp" not in str(traced.graph)
    assert loss.functions.compiled.ops.name not in str(traced.graph)
    found, expected = traced(*leaves, labels), both(*leaves, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


class Named(Tensor):
    """A subclass, which may keep more than its elements."""


def test_subclasses_are_pytorchs(loss: ModuleType) -> None:
    (hidden, weight, _), labels = projected(10, 8, 23)
    logits, own = problem(10, 23)
    for out in (
        loss.cross_entropy(logits.detach().as_subclass(Named), own),
        loss.linear_cross_entropy(hidden.detach().as_subclass(Named), weight, labels),
        loss.linear_cross_entropy(hidden, weight.detach().as_subclass(Named), labels),
    ):
        assert isinstance(out, Named)


def test_functions_take_the_compiled_ops(compiled: ModuleType) -> None:
    takes, (logits, labels) = compiled.functions.compiled.takes, problem(5, 7)
    assert all(takes(logits.to(dtype), labels) for dtype in DTYPES)
    assert not takes(logits.double(), labels)
    assert not takes(logits, labels.int())
    assert not takes(logits.to("meta"), labels)
    assert not takes(logits, labels.to("meta"))
    assert not takes(logits[:, :0], labels)


# Ops


def cases() -> dict[str, tuple]:
    logits, labels = torch.randn(4, 3, 40), torch.randint(0, 40, (4, 3))
    sums = torch.rand(24)
    hidden, weight, bias = torch.randn(12, 8), torch.randn(40, 8), torch.randn(40)
    flat, rest = labels.reshape(-1), (-100, 0.1, 1e-3)
    return {
        "cross_entropy": (logits.transpose(0, 1), labels.t(), *rest),
        "cross_entropy_backward": (torch.randn(3).expand(4, 3), logits, labels, sums, *rest),
        "cross_entropy_gradient_": (torch.randn(12, 40), flat, torch.ones(()).expand(12), *rest),
        "linear_cross_entropy": (hidden, weight, bias, flat, torch.rand(12), *rest, True, True, False),
    }


@pytest.mark.parametrize("op", cases())
def test_ops_are_what_their_schemas_and_shapes_say(compiled: ModuleType, op: str) -> None:
    torch.library.opcheck(getattr(compiled.functions.compiled.ops, op).default, cases()[op])


def test_the_op_of_the_build_without_compiled_ones(noarch: ModuleType) -> None:
    op = noarch.functions.projection._op
    torch.library.opcheck(op, cases()["linear_cross_entropy"])
    hidden, weight, _, *others = cases()["linear_cross_entropy"]
    torch.library.opcheck(op, (hidden.half(), weight.half(), None, others[0], None, *others[2:5], False, False, False))


def test_every_op_is_tested(compiled: ModuleType) -> None:
    namespace = compiled.functions.compiled.ops.cross_entropy.default.namespace
    found = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")}
    assert found == {*cases(), "use_level"}


def test_results_do_not_depend_on_the_number_of_threads(compiled: ModuleType) -> None:
    logits, labels = problem(37, 4099, torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = compiled.cross_entropy(logits, labels, reduction="none")
            found.append([out, *torch.autograd.grad(out, logits, torch.ones_like(out))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# Errors


@pytest.mark.parametrize("label", [7, -1, 2**40])
def test_a_label_that_is_no_class_is_an_error(loss: ModuleType, label: int) -> None:
    (hidden, weight, _), labels = projected(5, 4, 7)
    labels[2] = label
    logits = torch.randn(5, 7, requires_grad=True)
    for call in (
        lambda: loss.cross_entropy(logits, labels),
        lambda: loss.cross_entropy(logits.detach(), labels, reduction="none"),
        lambda: loss.linear_cross_entropy(hidden, weight, labels),
        lambda: loss.linear_cross_entropy(hidden.detach(), weight.detach(), labels),
    ):
        with pytest.raises(IndexError, match=f"{label} is out of bounds"):
            call()


WRONG = {
    "labels have shape": lambda loss: loss.cross_entropy(torch.randn(3, 7), torch.zeros(4, dtype=torch.int64)),
    "the labels have dtype torch.float32": lambda loss: loss.cross_entropy(torch.randn(3, 7), torch.zeros(3)),
    "dtype torch.bool": lambda loss: loss.cross_entropy(torch.randn(3, 7), torch.zeros(3, dtype=torch.bool)),
    "expected mean, sum, none": lambda loss: loss.cross_entropy(
        torch.randn(3, 7), torch.zeros(3, dtype=torch.int64), reduction="max"
    ),
    "expected 0 to 1": lambda loss: loss.cross_entropy(
        torch.randn(3, 7), torch.zeros(3, dtype=torch.int64), label_smoothing=1.5
    ),
    "the weight": lambda loss: loss.linear_cross_entropy(
        torch.randn(3, 7), torch.randn(9, 8), torch.zeros(3, dtype=torch.int64)
    ),
    "the bias has shape": lambda loss: loss.linear_cross_entropy(
        torch.randn(3, 7), torch.randn(9, 7), torch.zeros(3, dtype=torch.int64), torch.randn(7)
    ),
    "linear_cross_entropy: the labels": lambda loss: loss.linear_cross_entropy(
        torch.randn(3, 7), torch.randn(9, 7), torch.zeros(4, dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_errors(loss: ModuleType, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WRONG[message](loss)


def test_operands_on_two_devices_are_an_error(loss: ModuleType) -> None:
    logits, labels = torch.randn(3, 7), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="device"):
        loss.cross_entropy(logits, labels.to("meta"))
    with pytest.raises(RuntimeError, match="device"):
        loss.linear_cross_entropy(logits, torch.randn(9, 7, device="meta"), labels)
    with pytest.raises(RuntimeError, match="device"):
        loss.linear_cross_entropy(logits, torch.randn(9, 7), labels.to("meta"))


def refused() -> dict[str, Callable[[ModuleType], object]]:
    logits, labels = torch.randn(3, 7), torch.zeros(3, dtype=torch.int64)
    rest, scale = (-100, 0.0, 0.0), torch.ones(3)
    return {
        "expected all tensors on one device": lambda ops: ops._cross_entropy(logits.to("meta"), labels, *rest),
        "on one device, got": lambda ops: ops._cross_entropy(logits, labels.to("meta"), *rest),
        "not of dtype int64": lambda ops: ops._cross_entropy(logits, labels.int(), *rest),
        "another shape": lambda ops: ops._cross_entropy(logits, labels[:2], *rest),
        "of no class": lambda ops: ops._cross_entropy(logits[:, :0], labels, *rest),
        "neither float32": lambda ops: ops._cross_entropy(logits.double(), labels, *rest),
        "not one of the losses": lambda ops: ops._cross_entropy_backward(
            scale[:2], logits, labels, torch.rand(6), *rest
        ),
        "not those of the logits": lambda ops: ops._cross_entropy_backward(scale, logits, labels, torch.rand(5), *rest),
        "are not contiguous": lambda ops: ops._cross_entropy_gradient(logits[:, ::2], labels, scale, *rest),
        "not one float32 for each": lambda ops: ops._cross_entropy_gradient(logits, labels, scale[:2], *rest),
    }


@pytest.mark.parametrize("message", refused())
def test_the_ops_refuse_what_they_cannot_read(compiled: ModuleType, message: str) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        refused()[message](compiled.functions.compiled)


# The layer


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_layer_is_transformers_loss(loss: ModuleType, dtype: torch.dtype) -> None:
    logits = (torch.randn(2, 6, 31) * 4).to(dtype).requires_grad_()
    labels = torch.randint(0, 31, (2, 6))
    labels[0, :3] = -100
    layer = loss.layers.ForCausalLMLoss()
    for options in (
        {},
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 3, "labels": labels.clamp(min=3)},
        {"shift_labels": torch.randint(0, 31, (2, 6))},
        {"shift_labels": torch.randint(0, 31, (12,)), "labels": None},
        {"unknown": object()},
    ):
        arguments = {"logits": logits, "labels": labels, "vocab_size": 31, **options}
        got, expected = layer(**arguments), ForCausalLMLoss(**arguments)
        assert got.dtype is expected.dtype is torch.float32
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits))
    # Logits of another width are read as rows of the width that is said.
    wide = torch.randn(2, 3, 62)
    torch.testing.assert_close(
        layer(wide, None, 31, shift_labels=labels), ForCausalLMLoss(wide, None, 31, shift_labels=labels)
    )
