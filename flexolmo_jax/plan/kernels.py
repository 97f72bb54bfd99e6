"""What Pallas kernels compute that do not tell XLA themselves."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from flexolmo_jax.model.documents import SPLASH_BLOCK
from flexolmo_jax.plan.hlo import Instruction

_SPLASH = re.compile(r"splash_mha_(fwd|dkv|dq)")


class Products(NamedTuple):
    """Matrix products over all pairs of a query and a key that a kernel of splash attention makes.

    Attributes:
      needed: those of attention or of its gradients.
      again: those that an earlier kernel has made already: scores, and gradients of weights.
    """

    needed: int
    again: int


SPLASH = {
    "fwd": Products(2, 0),  # scores; output
    "dkv": Products(3, 1),  # scores again; gradients of weights, values and keys
    "dq": Products(1, 2),  # scores and gradients of weights again; gradient of queries
}


def splash_flops(instruction: Instruction, computation: Mapping[str, Instruction]) -> tuple[int, int] | None:
    """FLOPs of a kernel of splash attention, needed and computed again; None for any other instruction.

    Blocks of keys that come after all queries of a block are passed over.
    """
    named = _SPLASH.search(f"{instruction.name} {instruction.attributes}")
    if instruction.opcode != "custom-call" or not named:
        return None
    # Queries are the largest operand, [rows, heads, length, width]; XLA leaves out a single row's axis.
    queries = max((shape for name in instruction.operands for shape in computation[name].shapes), key=lambda s: s.size)
    length = queries.dims[-2]
    block = math.gcd(length, SPLASH_BLOCK)
    blocks = length // block
    one = 2 * queries.size // length * block * block * blocks * (blocks + 1) // 2
    products = SPLASH[named[1]]
    return one * products.needed, one * products.again
