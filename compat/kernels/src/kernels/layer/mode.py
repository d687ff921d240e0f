"""What a kernel is asked for, and when a layer may keep its forward."""

from kernelhub.layers.mode import KernelizeFallback, Mode

__all__ = ["KernelizeFallback", "Mode"]
