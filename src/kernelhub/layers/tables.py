"""Plain text tables: what `str()` of a plan or a report is."""

from __future__ import annotations

from collections.abc import Sequence

# What is said of a model in which nothing can run a kernel, as one that nobody has marked.
UNMARKED = (
    "it has no kernel-aware layers: kernelhub.integrations.transformers.mark(model) names those of transformers' models, "
    "use_kernel_forward_from_hub those of your own"
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows under their head, columns aligned; columns that are empty in every row are left out.

    >>> print(table(("path", "note", "kernel"), [("norm", "", "org/norm"), ("mlp.act", "", "")]))
    path     kernel
    norm     org/norm
    mlp.act
    """
    used = [index for index in range(len(head)) if any(row[index] for row in rows)] or list(range(len(head)))
    lines = [[line[index] for index in used] for line in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(used))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)
