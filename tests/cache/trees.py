"""What a radix tree holds, for checks."""

from __future__ import annotations

from headrace.cache import RadixTree
from headrace.cache.radix_tree import Node


def nodes(tree: RadixTree) -> list[Node]:
    """Every node that has pages."""
    found: list[Node] = []
    stack = list(tree._roots.values())
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        if len(node.pages):
            found.append(node)
    return found


def num_pages(tree: RadixTree) -> int:
    """Published pages."""
    return sum(len(node.pages) for node in nodes(tree))
