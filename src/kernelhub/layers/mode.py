"""What a kernel is asked for (`Mode`), and when a layer may keep its forward (`KernelizeFallback`).

>>> [str(mode) for mode in serving(Mode.TRAINING)]
['TRAINING', 'TRAINING|TORCH_COMPILE', 'FALLBACK']
"""

from __future__ import annotations

from enum import Flag

from kernelhub.errors import InvalidReference


class Mode(Flag):
    """What a model will be used for, and what a kernel was registered for.

    INFERENCE and TRAINING exclude each other; either combines with TORCH_COMPILE. FALLBACK stands alone and only
    registers: a kernel for whatever nothing else was registered for.
    """

    FALLBACK = 1
    TRAINING = 2
    INFERENCE = 4
    TORCH_COMPILE = 8

    def __or__(self, other: Mode) -> Mode:
        """Raises `InvalidReference` [ValueError] for a combination that cannot be."""
        if not isinstance(other, Mode):
            return NotImplemented
        both = Mode(self.value | other.value)
        if Mode.INFERENCE in both and Mode.TRAINING in both:
            raise InvalidReference(
                "Mode.INFERENCE and Mode.TRAINING exclude each other", hint="A TRAINING kernel serves inference too."
            )
        if Mode.FALLBACK in both and both is not Mode.FALLBACK:
            raise InvalidReference(
                "Mode.FALLBACK stands alone", hint="It registers a kernel for every mode that nothing else serves."
            )
        return both

    def __invert__(self) -> Mode:
        # Python 3.10 builds the complement with `|`, which would refuse it; it is only ever a mask for `&`.
        return Mode(15 & ~self.value)

    def __str__(self) -> str:
        return "|".join(member.name or "" for member in _NAMED if member in self)


_NAMED = (Mode.FALLBACK, Mode.TRAINING, Mode.INFERENCE, Mode.TORCH_COMPILE)

# Which registered mode serves which asked-for one, best first. A training kernel computes the same forward, so it
# serves inference; nothing serves torch.compile but what was made for it, or a fallback that says it can.
_SERVING: dict[Mode, tuple[Mode, ...]] = {
    Mode.INFERENCE: (
        Mode.INFERENCE,
        Mode.INFERENCE | Mode.TORCH_COMPILE,
        Mode.TRAINING,
        Mode.TRAINING | Mode.TORCH_COMPILE,
        Mode.FALLBACK,
    ),
    Mode.INFERENCE | Mode.TORCH_COMPILE: (
        Mode.INFERENCE | Mode.TORCH_COMPILE,
        Mode.TRAINING | Mode.TORCH_COMPILE,
        Mode.FALLBACK,
    ),
    Mode.TRAINING: (Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE, Mode.FALLBACK),
    Mode.TRAINING | Mode.TORCH_COMPILE: (Mode.TRAINING | Mode.TORCH_COMPILE, Mode.FALLBACK),
}


def serving(mode: Mode) -> tuple[Mode, ...]:
    """The registered modes that serve the asked-for `mode`, best first.

    Raises `InvalidReference` [ValueError] for a mode that a model cannot be used in: FALLBACK, TORCH_COMPILE alone.
    """
    tried = _SERVING.get(mode) if isinstance(mode, Mode) else None
    if tried is None:
        raise InvalidReference(
            f"a model cannot be kernelized for mode {mode}",
            hint="Expected Mode.INFERENCE or Mode.TRAINING, with | Mode.TORCH_COMPILE where it is compiled.",
        )
    return tried


class KernelizeFallback(Flag):
    """The cases in which a layer may keep its forward; in the others `kernelize` raises.

    CANNOT_LOAD: no variant, not found, hub unavailable, missing dependency, unfit device. CONTRACT: the kernel cannot
    stand in for the forward. DEFAULT is all but these two, because both mean that what was asked for is broken.
    """

    NO_LAYER = 1
    NO_DEVICE = 2
    NO_COMPATIBLE_PROPERTIES = 4
    NO_COMPATIBLE_MODE = 8
    CANNOT_LOAD = 16
    CONTRACT = 32
    NOT_EQUAL = 64
    NOT_FASTER = 128
    NONE = 0
    DEFAULT = NO_LAYER | NO_DEVICE | NO_COMPATIBLE_PROPERTIES | NO_COMPATIBLE_MODE | NOT_EQUAL | NOT_FASTER
    ALL = DEFAULT | CANNOT_LOAD | CONTRACT

    @classmethod
    def of(cls, value: bool | KernelizeFallback) -> KernelizeFallback:
        """`True` is DEFAULT, `False` is NONE."""
        if isinstance(value, cls):
            return value
        if isinstance(value, bool):
            return cls.DEFAULT if value else cls.NONE
        raise InvalidReference(f"use_fallback must be a bool or a KernelizeFallback, got {value!r}")
