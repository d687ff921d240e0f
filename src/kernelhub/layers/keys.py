"""Keys of several layers that one kernel computes: `((layer name, path), ...)`."""

from __future__ import annotations

FusionKey = tuple[tuple[str, str], ...]


def check_key(key: object) -> str:
    """What is wrong with a key of several layers; empty where nothing is.

    >>> check_key((("RMSNorm", "layers.*.norm"), ("MLP", "layers.*.mlp")))
    ''
    >>> check_key((("RMSNorm", "layers.*.norm"), ("MLP", "blocks.*.mlp")))
    "the layers have different parents: 'layers.*' and 'blocks.*'; only children of one module can be fused"
    """
    form = 'expected (("RMSNorm", "model.layers.*.norm"), ("MLP", "model.layers.*.mlp"))'
    if not isinstance(key, tuple) or not key:
        return f"it names no layers; {form}"
    for item in key:
        if not isinstance(item, tuple) or len(item) != 2 or not all(isinstance(text, str) and text for text in item):
            return f"{item!r} is not a layer's name and a path; {form}"
        if "*" in item[1].rpartition(".")[2] or not all(item[1].split(".")):
            return f"{item[1]!r} does not end in the name of a child; {form}"
    parents = list(dict.fromkeys(path.rpartition(".")[0] for _, path in key))
    if len(parents) > 1:
        shown = " and ".join(map(repr, parents))
        return f"the layers have different parents: {shown}; only children of one module can be fused"
    if len({path for _, path in key}) < len(key):
        return "it names a child twice"
    return ""


def title(key: FusionKey) -> str:
    """`RMSNorm + MLP`."""
    return " + ".join(name for name, _ in key)
