"""What comes of a site once the kernels are loaded."""

from __future__ import annotations

from typing import NamedTuple

from kernelhub.layers.evidence import Evidence
from kernelhub.layers.kernel import LayerKernel, Swap
from kernelhub.layers.mode import KernelizeFallback
from kernelhub.layers.survey import Site, site_class


class Outcome(NamedTuple):
    """A kernel, or the reason why the layer keeps its forward.

    Layers of one class on one device share one, until something is measured of each; `name` is the class's. `others` are
    the kernels after the first that could stand there too: a measurement decides between them.
    """

    name: str
    kernel: LayerKernel | None
    swap: Swap | None
    reason: str = ""
    evidence: Evidence | None = None
    others: tuple[tuple[LayerKernel, Swap], ...] = ()


def where(site: Site) -> str:
    """The layer, as errors and warnings name it."""
    return f"{site.path or 'the model'} ({site_class(site)})"


def allow(case: KernelizeFallback) -> str:
    """What to do about a layer that may not keep its forward."""
    return f"Register a kernel for it, leave it out with exclude=, or allow KernelizeFallback.{case.name}."
