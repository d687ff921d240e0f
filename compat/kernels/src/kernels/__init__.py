"""kernelhub under the name `kernels`: each public name here is the one of kernelhub, imported when it is first used.

Only `kernelize` is another: it decides on each rank alone, as the package of that name does.
"""

from __future__ import annotations

from typing import Any

import kernelhub

# transformers 5.22 accepts 0.17.2 up to 0.18; whose this is stands behind the plus.
__version__ = "0.17.2+kernelhub"

__all__ = [name for name in kernelhub.__all__ if not name.startswith("_")]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kernels' (of kernelhub) has no attribute {name!r}")
    if name == "kernelize":
        from kernels.layer import kernelize

        return kernelize
    return getattr(kernelhub, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
