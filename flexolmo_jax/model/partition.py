"""The one predicate that says which leaves belong to the anchor, to an expert and to a router row.

Gradients, optimizer moments, the clipping norm, the compute dtype and the contents of a checkpoint all follow it.
Parameters travel as nested dicts under the paths of the schema; `flatten` and `unflatten` name their leaves.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flexolmo_jax.model.config import PUBLIC

LeafPath = tuple[str, ...]
Predicate = Callable[[LeafPath], bool]


def belongs_to_expert(path: LeafPath, name: str) -> bool:
    """Whether the leaf is part of this expert: its feed-forward networks, its router row or its bias."""
    return path[0] in ("experts", "router") and path[1] == name


def belongs_to_anchor(path: LeafPath) -> bool:
    """Whether the leaf is shared by all owners: the attention, norms, embeddings, and the public expert and its row."""
    return path[0] == "anchor" or belongs_to_expert(path, PUBLIC)


def belongs_to_router(path: LeafPath) -> bool:
    """Whether the leaf is a router row or bias, of whichever expert."""
    return path[0] == "router"


def is_matrix(path: LeafPath) -> bool:
    """Whether weight decay applies: a projection or a head, not a norm, an embedding, a router row or a bias."""
    return path[-1] in ("q", "k", "v", "o", "gate", "up", "down", "head")


def flatten(tree: Mapping[str, Any], prefix: LeafPath = ()) -> dict[LeafPath, Any]:
    """Leaves of a nested dict by path, in sorted order."""
    flat: dict[LeafPath, Any] = {}
    for key in sorted(tree):
        value = tree[key]
        flat |= flatten(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value}
    return flat


def unflatten(flat: Mapping[LeafPath, Any]) -> dict[str, Any]:
    """The nested dict whose leaves are `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def select(tree: Mapping[str, Any], predicate: Predicate) -> dict[str, Any]:
    """The part of a tree whose paths satisfy the predicate."""
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if predicate(path)})


def split(tree: Mapping[str, Any], predicate: Predicate) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts of a tree that satisfy the predicate and that do not."""
    return select(tree, predicate), select(tree, lambda path: not predicate(path))


def join(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that holds the leaves of all; a path in more than one of them is a mistake of the caller."""
    flat: dict[LeafPath, Any] = {}
    for tree in trees:
        leaves = flatten(tree)
        if clash := flat.keys() & leaves.keys():
            raise ValueError(f"the trees share {'/'.join(sorted(clash)[0])}")
        flat |= leaves
    return unflatten(flat)
