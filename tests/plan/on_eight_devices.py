"""Small programs compiled for eight simulated devices, and what is read of them; prints one JSON object.

Arguments are names of jobs, a mesh and a remat policy, such as `train-expert:fsdp:full`.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from flexolmo_jax.model import ModelConfig
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.plan import compilation, estimate, hlo, measures, minimum
from flexolmo_jax.plan.jobs import Job
from flexolmo_jax.train.run import RunConfig

MODEL = ModelConfig(vocab_size=96, width=32, hidden=48, layers=3, heads=4, kv_heads=2, bias_channel=True)
MESHES = {
    "fsdp": {"layout": "fsdp", "fsdp": 8},
    "replicas": {"layout": "fsdp", "data": 2, "fsdp": 4},
    "expert": {"layout": "fsdp_expert", "fsdp": 2, "expert": 4},
}
EXPERTS = {"pretrain": 1, "train-expert": 2, "tune-router": 4, "forward": 4, "generate": 4}
ROWS, LENGTH, LOOPS = 16, 24, 5


def collectives() -> dict:
    """Each collective on a [16, 4] float32 piece of every device, in a loop."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    bodies = {
        "all-gather": lambda a: jax.lax.all_gather(a, "x", tiled=True)[: a.shape[0]],
        "all-reduce": lambda a: jax.lax.psum(a, "x"),
        "reduce-scatter": lambda a: jnp.tile(jax.lax.psum_scatter(a, "x", tiled=True), (8, 1)),
        "all-to-all": lambda a: jax.lax.all_to_all(a, "x", 0, 0, tiled=True),
        "collective-permute": lambda a: jax.lax.ppermute(a, "x", [(i, (i + 1) % 8) for i in range(8)]),
    }
    found = {}
    for kind, body in bodies.items():

        def loop(a, body=body):
            return jax.lax.scan(lambda carry, _: (jnp.sin(body(carry)), None), a, None, length=LOOPS)[0]

        spec = PartitionSpec("x")
        mapped = jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        a = jax.ShapeDtypeStruct((8 * 16, 4), jnp.float32, sharding=NamedSharding(mesh, spec))
        found[kind] = measures.traffic(hlo.parse(jax.jit(mapped).lower(a).compile().as_text()))
    return found


def planned(kind: str, mesh: str, remat: str) -> dict:
    run = RunConfig(steps=4, batch_size=ROWS, sequence_length=LENGTH, remat=remat)
    job = Job(kind=kind, model=MODEL, run=run, experts=EXPERTS[kind], top_k=EXPERTS[kind], new_tokens=8)
    layout = MeshConfig(**MESHES[mesh]).build()
    compiled = compilation.compile_program(job.program(layout), layout, 2**30)
    module = hlo.parse(compiled.text)
    return {
        "flops": measures.flops(module)._asdict(),
        "least_flops": minimum.flops(job).total,
        "traffic": sum(measures.traffic(module).values()),
        "least_traffic": minimum.traffic(job, layout).total,
        "least_traffic_of_tokens": minimum.traffic(job, layout).tokens,
        "arguments": compiled.memory.arguments,
        "estimated_arguments": estimate.memory(job, layout, 2**30).arguments,
    }


if __name__ == "__main__":
    report: dict = {"collectives": collectives()}
    report |= {name: planned(*name.split(":")) for name in sys.argv[1:]}
    print(json.dumps(report))
