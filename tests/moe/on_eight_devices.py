"""A program on eight simulated devices: checks implementations on meshes with so many cases; prints what it did."""

import json
import sys

import jax

from flexolmo_jax.moe import IMPLEMENTATIONS
from flexolmo_jax.parallel import MeshConfig
from tests.moe.parity import EDGES, check


def main() -> None:
    cases = EDGES[: int(sys.argv[2])]
    for implementation, axes in json.loads(sys.argv[1]):
        with jax.set_mesh(MeshConfig(layout="fsdp_expert", **axes).build().mesh):
            for case in cases:
                check(IMPLEMENTATIONS[implementation], case)
        print(implementation, axes, f"{len(cases)} cases")


if __name__ == "__main__":
    main()
