"""The compiled CUDA ops of kernelhub/loss: against float64 and PyTorch's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from kernelprojects import load_compiled
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs CUDA"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((5, 1), (7, 33), (300, 1000), (67, 1001), (40, 32000), (9, 128256))
OPTIONS = ({}, {"label_smoothing": 0.1}, {"z_loss": 1e-3}, {"label_smoothing": 0.2, "z_loss": 1e-2})


@pytest.fixture(scope="session")
def loss(request: pytest.FixtureRequest) -> ModuleType:
    return load_compiled("loss", request.config)


def operands(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows)
    logits = (torch.randn(rows, classes, generator=generator, device="cuda") * 4).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator, device="cuda")
    labels[rows // 2] = -100
    return logits, labels


def formula(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return losses + z_loss * torch.logsumexp(logits, -1) ** 2 * (labels != -100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_and_gradients_against_float64(loss: ModuleType, options: dict[str, float], dtype: torch.dtype) -> None:
    for rows, classes in SHAPES:
        logits, labels = operands(rows, classes, dtype)
        wide, narrow = logits.double().requires_grad_(), logits.clone().requires_grad_()
        seed = torch.rand(rows, device="cuda")
        expected = formula(wide, labels, **options)
        got = loss.cross_entropy(narrow, labels, reduction="none", **options)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-5)
        (expected_grad,) = torch.autograd.grad(expected, wide, seed.double())
        (got_grad,) = torch.autograd.grad(got, narrow, seed)
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(got_grad.double(), expected_grad, rtol=tolerance, atol=tolerance / 10)
        assert not got_grad[rows // 2].any()
        # the same in place
        scratch = logits.clone()
        again = loss.functions.compiled.gradient_(
            scratch, labels, seed, -100, options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
        )
        torch.testing.assert_close(again, got, rtol=1e-6, atol=1e-5)  # long rows are summed by more threads then
        torch.testing.assert_close(scratch, got_grad, rtol=tolerance, atol=tolerance / 10)


def test_rows_without_a_finite_logit_and_with_nan(loss: ModuleType) -> None:
    logits = torch.randn(5, 4096, device="cuda")
    logits[0] = float("-inf")
    logits[1, 7] = float("nan")
    logits[2, 7] = float("inf")
    logits[3, :4000] = float("-inf")
    labels = torch.full((5,), 4050, device="cuda")
    got, expected = (
        loss.cross_entropy(logits, labels, reduction="none"),
        F.cross_entropy(logits, labels, reduction="none"),
    )
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_two_runs_give_the_same_bits_and_strides_do_not_matter(loss: ModuleType) -> None:
    logits, labels = operands(64, 32000, torch.bfloat16)
    apart = torch.cat([logits, logits], -1)[:, :32000]
    found = []
    for some in (logits, logits, apart):
        leaf = some.detach().requires_grad_()
        total = loss.cross_entropy(leaf, labels)
        found.append([total, *torch.autograd.grad(total, leaf)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weights_gradient_is_rounded_once(loss: ModuleType, dtype: torch.dtype) -> None:
    """Of 8 parts, whose products are added in float32: as near to float64 as of all rows at once, and the same twice."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=generator, device="cuda") for n in (2048, 65600))
    hidden, weight = hidden.to(dtype).requires_grad_(), (weight / 16).to(dtype).requires_grad_()
    labels = torch.randint(0, 65600, (2048,), generator=generator, device="cuda")
    labels[::7] = -100
    found = []
    for _ in range(2):
        total = 64 * loss.linear_cross_entropy(hidden, weight, labels, z_loss=1e-4)
        found.append(torch.autograd.grad(total, (hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def whole(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        logits = F.linear(hidden, weight)
        logits = logits if logits.dtype is torch.float64 else logits.float()
        return torch.autograd.grad(
            64 * formula(logits, labels, z_loss=1e-4).sum() / (labels != -100).sum(), (hidden, weight)
        )

    exact = whole(*(x.detach().double().requires_grad_() for x in (hidden, weight)))
    for name, ours, theirs, reference in zip(("hidden", "weight"), found[0], whole(hidden, weight), exact, strict=True):
        ours_off, theirs_off = ((x.double() - reference).square().mean().sqrt() for x in (ours, theirs))
        # The hidden states' are one product of all classes in either, which cuBLAS may split in its own way.
        assert ours_off <= (1.05 if name == "weight" else 2.0) * theirs_off, name


def test_the_projection_holds_the_weights_gradient_twice_or_the_logits_of_a_part(loss: ModuleType) -> None:
    """Beside its sum in float32; and never all logits."""
    hidden = torch.randn(4096, 512, device="cuda").to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(32768, 512, device="cuda") / 20).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 32768, (4096,), device="cuda")
    loss.linear_cross_entropy(hidden, weight, labels).backward()  # cuBLAS has its workspace
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.linear_cross_entropy(hidden, weight, labels).backward()
    size = 2 * weight.numel()
    assert torch.cuda.max_memory_allocated() - before <= 3 * size + 2 * hidden.numel() + (1 << 20)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_gradients_are_scaled_in_the_wider_dtype(loss: ModuleType, dtype: torch.dtype) -> None:
    scale_ = loss.functions.compiled.scale_
    for size, skipped in itertools.product((0, 1, 8, 1001, 3_000_001), (0, 1)):
        memory = torch.randn(size + skipped, device="cuda").to(dtype)
        x, before = memory[skipped:], memory.clone()
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        for factor in (1.0, 0.3, 65537.0):
            by = torch.tensor(factor, device="cuda", dtype=wide)
            expected = (x.to(wide) * by).to(dtype)
            scale_(x, by)
            assert torch.equal(x, expected)
        assert torch.equal(memory[:skipped], before[:skipped])
    x = torch.full((40,), float("nan"), device="cuda", dtype=dtype)
    scale_(x, torch.ones((), device="cuda", dtype=wide))
    assert x.isnan().all()


def test_ops_are_what_their_schemas_say(loss: ModuleType) -> None:
    logits, labels = operands(6, 40, torch.float32)
    ops = loss.functions.compiled.ops
    torch.library.opcheck(ops.cross_entropy.default, (logits, labels, -100, 0.1, 0.0))
    losses, sums = ops.cross_entropy(logits, labels, -100, 0.1, 0.0)
    torch.library.opcheck(ops.cross_entropy_backward.default, (losses, logits, labels, sums, -100, 0.1, 0.0))
    torch.library.opcheck(ops.cross_entropy_gradient_.default, (logits, labels, losses, -100, 0.1, 0.0))
    torch.library.opcheck(ops.scale_.default, (logits, losses.sum()))


def test_tensors_of_more_than_2_31_elements(loss: ModuleType, needs_memory: Callable[[int], None]) -> None:
    """The last rows are what they are alone, bit for bit."""
    ops, options, classes = loss.functions.compiled.ops, (-100, 0.1, 1e-3), 128256
    rows = (1 << 31) // classes + 9
    needs_memory(12 << 30)
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda").normal_()
    labels = torch.randint(0, classes, (rows,), device="cuda")
    labels[-2] = -100
    grad, by = torch.rand(rows, device="cuda"), torch.full((), 0.5, device="cuda")
    last, of_last, last_grad = logits[-5:].clone(), labels[-5:], grad[-5:]
    losses, sums = ops.cross_entropy(logits, labels, *options)
    some, some_sums = ops.cross_entropy(last, of_last, *options)
    assert torch.equal(losses[-5:], some)
    torch.testing.assert_close(some, formula(last.float(), of_last, *options[1:]), rtol=1e-5, atol=1e-5)
    gradient = ops.cross_entropy_backward(grad, logits, labels, sums, *options)
    expected = ops.cross_entropy_backward(last_grad, last, of_last, some_sums, *options)
    assert torch.equal(gradient[-5:], expected)
    del gradient
    in_place = ops.cross_entropy_gradient_(logits, labels, grad, *options)
    assert torch.equal(in_place[-5:], ops.cross_entropy_gradient_(last, of_last, last_grad, *options))
    assert torch.equal(logits[-5:], last)
    ops.scale_(logits, by)
    assert torch.equal(logits[-5:], last * by)


def test_more_than_2_31_rows(loss: ModuleType, needs_memory: Callable[[int], None]) -> None:
    """The last rows are what they are alone, bit for bit, and those in between what the first is."""
    ops, options, rows, classes = loss.functions.compiled.ops, (-100, 0.1, 1e-3), (1 << 31) + 24, 2
    needs_memory(80 << 30)
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    labels, grad = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.ones(rows, device="cuda")
    last, of_last, last_grad = logits[-32:].normal_().clone(), labels[-32:].random_(0, 2), grad[-32:].uniform_()
    losses, sums = ops.cross_entropy(logits, labels, *options)
    some, some_sums = ops.cross_entropy(last, of_last, *options)
    torch.testing.assert_close(some, formula(last.float(), of_last, *options[1:]), rtol=1e-5, atol=1e-5)
    assert torch.equal(losses[-32:], some)
    assert (losses[:-32] == losses[0]).all()
    gradient = ops.cross_entropy_backward(grad, logits, labels, sums, *options)
    assert torch.equal(gradient[-32:], ops.cross_entropy_backward(last_grad, last, of_last, some_sums, *options))
    del gradient, losses, sums
    in_place = ops.cross_entropy_gradient_(logits, labels, grad, *options)
    assert torch.equal(in_place[-32:], ops.cross_entropy_gradient_(last, of_last, last_grad, *options))
    assert torch.equal(logits[-32:], last)


def test_a_row_of_more_than_2_31_classes(loss: ModuleType, needs_memory: Callable[[int], None]) -> None:
    """All alike, so that the sum is their number; the label is the last."""
    ops, options, classes = loss.functions.compiled.ops, (-100, 0.0, 0.0), (1 << 31) + 8
    needs_memory(12 << 30)
    logits = torch.zeros(1, classes, dtype=torch.bfloat16, device="cuda")
    labels, grad = torch.tensor([classes - 1], device="cuda"), torch.ones(1, device="cuda")
    losses, sums = ops.cross_entropy(logits, labels, *options)
    gradient = ops.cross_entropy_backward(grad, logits, labels, sums, *options)
    in_place = ops.cross_entropy_gradient_(logits, labels, grad, *options)
    for found in (losses, in_place):
        torch.testing.assert_close(found.double().cpu(), torch.tensor([classes], dtype=torch.float64).log())
    for found in (gradient, logits):
        assert found[0, -1] == -1
        assert (found[0, :-1] == torch.tensor(1 / classes, dtype=torch.bfloat16)).all()
