"""How far a kernel's results may be from the original's.

>>> Tolerance(rtol=0.5, of_largest=0.25).allowed(torch.tensor([1.0, -4.0]), largest=4.0).tolist()
[1.5, 3.0]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernelhub.errors import InvalidReference


@dataclass(frozen=True)
class Tolerance:
    """An error of `atol + rtol * |value| + of_largest * (the largest |value| of the tensor)` is allowed.

    `of_largest` is there because sums of many terms cancel: the error of a small element is that of the large terms it is
    the sum of, and a fixed `atol` knows nothing of their size. All are 0 by default; all 0 is a comparison of values.

    Raises `InvalidReference` [ValueError] where one is negative or not a number.
    """

    rtol: float = 0.0
    atol: float = 0.0
    of_largest: float = 0.0
    bits: bool = False

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "of_largest"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise InvalidReference(
                    f"Tolerance: {name}={value!r}", hint="Expected a number from 0 on, such as 1e-5."
                )

    @classmethod
    def exact(cls) -> Tolerance:
        """Equal bits: -0.0 is not 0.0. A NaN is equal to a NaN."""
        return cls(bits=True)

    def allowed(self, reference: torch.Tensor, largest: float) -> torch.Tensor:
        """The error that is allowed at each element of `reference` (any shape), whose largest finite one is `largest`."""
        return reference.abs() * self.rtol + (self.atol + self.of_largest * largest)


def _of_rounding(dtype: torch.dtype, units: float) -> Tolerance:
    eps = torch.finfo(dtype).eps
    return Tolerance(rtol=units * eps, of_largest=units * eps)


# Four units of rounding in the short types, in which a layer rounds a few times; more in the long ones, where what counts is
# the length of the sums: a matrix product over 10,000 terms in float32 was seen to be 30 units from itself in another order.
DEFAULTS: dict[torch.dtype, Tolerance] = {
    torch.bfloat16: _of_rounding(torch.bfloat16, 4),
    torch.float16: _of_rounding(torch.float16, 4),
    torch.float32: _of_rounding(torch.float32, 100),
    torch.float64: _of_rounding(torch.float64, 100),
    torch.complex64: _of_rounding(torch.complex64, 100),
    torch.complex128: _of_rounding(torch.complex128, 100),
}
EXACT = Tolerance.exact()


def tolerance_for(dtype: torch.dtype, given: Tolerance | None) -> Tolerance:
    """What `given` (None: the default) allows a tensor of this dtype. What is not floating point must be equal."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return EXACT
    return given if given is not None else DEFAULTS.get(dtype, EXACT)
