"""What a job needs by formulas alone: for accelerators that cannot be compiled for here, and to order a search.

Axis legend: `L` layers, `D` width, `F` hidden, `V` vocabulary, `H` heads, `K` choices per token; `T` tokens.
"""

import math

from flexolmo_jax.model.attention_blocks import queries_at_once
from flexolmo_jax.model.partition import flatten
from flexolmo_jax.parallel import Layout
from flexolmo_jax.parallel.layouts import BATCH_AXES
from flexolmo_jax.plan import minimum
from flexolmo_jax.plan.compilation import Memory
from flexolmo_jax.plan.jobs import TRAINING, Job
from flexolmo_jax.train.run import DTYPES
from flexolmo_jax.train.token_losses import POSITIONS_AT_ONCE

FLOAT32 = 4


def memory(job: Job, layout: Layout, available: int) -> Memory:
    """HBM of one device, in bytes. Arguments are exact; temporaries are the largest that live together.

    Training keeps each block's input, with the policy "dots" also the results of its products and of attention, and
    with "none" about nine more arrays as wide as the model. On top come the gathered weights of two blocks (one in use,
    one on its way), what one block works on, the gradients, and logits of a piece of a row.
    """
    model, run = job.model, job.run
    sizes = dict(layout.mesh.shape)
    rows = run.batch_size / run.accumulation / math.prod(sizes[axis] for axis in BATCH_AXES)
    tokens, width = rows * run.sequence_length, DTYPES[run.compute_dtype].dtype.itemsize
    trains = job.kind in TRAINING
    trained, frozen = (_bytes(tree, layout) for tree in job.params())
    batch = (5 if trains else 1) * FLOAT32 * tokens * run.accumulation
    arguments = trained * 3 + frozen + batch
    products = 2 * model.width + 2 * model.kv_width + job.top_k * (2 * model.hidden + model.width)
    block = queries_at_once(run.sequence_length)
    attention = rows * model.heads * block * run.sequence_length * (FLOAT32 + width)
    work = tokens * (products + 4 * model.width) * FLOAT32 + attention
    kept = {
        "full": model.width,
        "dots": 2 * model.width + products,
        "none": 11 * model.width + products,
    }[run.remat]
    gathered = 2 * job.experts * 3 * model.width * model.hidden * width / sizes["expert"] / sizes["tensor"]
    positions = min(POSITIONS_AT_ONCE, run.sequence_length) if trains else run.sequence_length
    logits = 2 * rows * positions * model.vocab_size * FLOAT32 + model.width * model.vocab_size * width
    cache = 2 * rows * (run.sequence_length + job.new_tokens) * model.kv_width * model.layers * width
    return Memory(
        arguments=round(arguments),
        outputs=0 if trains else round(rows * run.sequence_length * model.vocab_size * FLOAT32),
        temporaries=round(
            work
            + gathered
            + (logits if trains or job.kind == "forward" else cache)
            + trains * (trained * (1 + (run.accumulation > 1)) + tokens * kept * width * model.layers)
        ),
        code=0,
        available=available,
    )


def recomputed_flops(job: Job) -> float:
    """FLOPs, over all devices, of what a step computes a second time.

    Attention's backward pass computes its scores again, half of its products. Rematerialisation in full repeats every
    block, and a trained head makes the logits of long rows again.
    """
    if job.kind not in TRAINING:
        return 0.0

    def again(product: minimum.Product) -> float:
        if product.layer == job.model.layers:
            trained = job.is_trained(("anchor", "head"))
            return product.flops * (trained and job.run.sequence_length > POSITIONS_AT_ONCE)
        scores = product.flops / 2 if product.path is None else 0.0
        return scores + product.flops * (job.run.remat == "full")

    return job.tokens * sum(again(product) for product in minimum.products(job))


def _bytes(tree: dict, layout: Layout) -> float:
    """Bytes of a device's pieces of a tree of parameters."""
    shardings = flatten(layout.shardings(tree))
    return sum(
        math.prod(shardings[path].shard_shape(leaf.shape)) * leaf.dtype.itemsize for path, leaf in flatten(tree).items()
    )
