"""The least that a job must compute, send and keep: formulas from the shapes alone, to hold compiled programs against.

Only matrix products count as computing. Axis legend: `L` layers, `D` width, `F` hidden, `V` vocabulary, `E` experts,
`K` choices per token; `T` tokens, `S` positions.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from flexolmo_jax.model.partition import LeafPath, flatten, is_matrix
from flexolmo_jax.parallel import Layout
from flexolmo_jax.parallel.layouts import BATCH_AXES
from flexolmo_jax.plan.jobs import TRAINING, Job
from flexolmo_jax.train.run import DTYPES


class Product(NamedTuple):
    """Matrix products that read one weight, or the two of attention, which read none.

    Attributes:
      path: of the weight; None for attention.
      layer: number of the block; `L` for the head.
      flops: of the forward pass, for one token.
      input_gradient: FLOPs of the gradient with respect to its inputs, where anything below is trained.
      weight_gradient: FLOPs of the gradient with respect to the weight, where it is trained.
    """

    path: LeafPath | None
    layer: int
    flops: float
    input_gradient: float
    weight_gradient: float


class Flops(NamedTuple):
    """Floating-point operations of one step, over all devices."""

    forward: float
    input_gradients: float
    weight_gradients: float

    @property
    def total(self) -> float:
        return sum(self)


def products(job: Job) -> Iterator[Product]:
    """All of them, in the order of the forward pass, with the gradients that the job cannot do without.

    A gradient with respect to inputs is needed exactly if something below is trained: in an expert job that is nothing
    below the first block's experts, so there neither attention nor the public expert is differentiated. Attention is
    causal: a token of `S` looks at `(S + 1) / 2` positions on average. Of the experts, `K` count per token; which ones
    the router picks makes no difference where it picks evenly.
    """
    model, length = job.model, job.run.sequence_length
    below = job.is_trained(("anchor", "embed"))

    def weighted(path: LeafPath, layer: int, flops: float, share: float = 1.0) -> Product:
        trained = job.is_trained(path)
        return Product(path, layer, share * flops, share * flops * below, share * flops * trained)

    for layer in range(model.layers):
        for name, width in (("q", model.width), ("k", model.kv_width), ("v", model.kv_width)):
            yield weighted(("anchor", "attention", name), layer, 2 * model.width * width)
        below = below or any(job.is_trained(("anchor", "attention", name)) for name in "qkv")
        attention = 4 * model.width * (length + 1) / 2
        yield Product(None, layer, attention, 2 * attention * below, 0.0)
        yield weighted(("anchor", "attention", "o"), layer, 2 * model.width**2)
        below = below or job.is_trained(("anchor", "attention", "o"))
        above = below
        for name in job.names:
            share = job.top_k / job.experts
            yield weighted(("router", name, "row"), layer, 2 * model.width)
            for matrix in ("gate", "up"):
                yield weighted(("experts", name, matrix), layer, 2 * model.width * model.hidden, share)
            below = above or job.is_trained(("experts", name, "gate"))
            yield weighted(("experts", name, "down"), layer, 2 * model.width * model.hidden, share)
            below = above
        below = above or any(
            job.is_trained(path) for name in job.names for path in (("experts", name, "gate"), ("router", name, "row"))
        )
    yield weighted(("anchor", "head"), model.layers, 2 * model.width * model.vocab_size)


def flops(job: Job) -> Flops:
    """The least floating-point operations of a step, over all devices; for `generate`, of all rows and new tokens."""
    found = list(products(job))
    trains = job.kind in TRAINING
    if job.kind == "generate":
        return Flops(_generating(job, found), 0.0, 0.0)
    return Flops(
        job.tokens * sum(each.flops for each in found),
        job.tokens * sum(each.input_gradient for each in found) * trains,
        job.tokens * sum(each.weight_gradient for each in found) * trains,
    )


def _generating(job: Job, found: list[Product]) -> float:
    """Prompt tokens need no head but the last; a new token looks at all before it."""
    rows, prompt, new = job.run.batch_size, job.run.sequence_length, job.new_tokens
    head = found[-1].flops
    body = sum(each.flops for each in found[:-1] if each.path)
    looks = 4 * job.model.width * job.model.layers
    positions = prompt + new - 1  # the last new token is not read again
    return rows * (positions * body + new * head + looks * positions * (positions + 1) / 2)


class Traffic(NamedTuple):
    """Bytes that one device receives from others in one step, by kind."""

    gather: float
    reduce: float
    tokens: float

    @property
    def total(self) -> float:
        return sum(self)


def traffic(job: Job, layout: Layout) -> Traffic:
    """The least bytes that a device must receive with this layout, in one step.

    - gather: every matrix that is cut over `fsdp` comes together once for a forward pass (each new token is one) and,
      where gradients pass through it, once for the backward pass, in the compute dtype: keeping all of them in between
      would undo the cut. The head's backward pass follows at once, and an embedding is looked up, which takes no more
      than the tokens' own vectors.
    - reduce: the gradient of every trained leaf is summed, in the compute dtype, over the devices that saw other rows;
      each is left with its own piece of the sum, and pieces that several devices keep are summed among these.
    - tokens: over `expert` the tokens of a layer are shown around and their mixed outputs handed back (in an expert job
      each expert's own, which its restraints compare), and over `tensor` the outputs of attention and experts are
      summed, in the forward pass and again in the backward pass.

    Gathering `n` pieces of `b` bytes in all receives `b (n - 1) / n`, reducing so many with each left one piece the
    same, and with everyone left the whole sum, twice that (Chan et al., "Collective communication", 2007).
    """
    sizes = dict(layout.mesh.shape)
    bytes_each = DTYPES[job.run.compute_dtype].dtype.itemsize
    pieces_of_batch = math.prod(sizes[axis] for axis in BATCH_AXES)
    local_tokens = job.tokens / job.run.accumulation / pieces_of_batch
    gather = reduce = tokens = 0.0
    passes = 1 + job.new_tokens if job.kind == "generate" else 1
    through = Counter(each.path for each in products(job) if each.input_gradient and _trains(job))
    trained, frozen = job.params()
    for tree in (trained, frozen):
        shardings = flatten(layout.shardings(tree))
        for path, leaf in flatten(tree).items():
            axes = [axis for part in shardings[path].spec for axis in _names(part)]
            stays = math.prod(sizes[axis] for axis in axes if axis != "fsdp")
            held = leaf.size * bytes_each / stays
            fsdp = sizes["fsdp"] if "fsdp" in axes else 1
            vectors = local_tokens * job.model.width * bytes_each
            if path[-1] == "embed":
                gather += min(passes * held, vectors) * _others(fsdp)
            elif is_matrix(path):
                again = through[path] / job.model.layers if path[-1] != "head" else 0
                gather += held * _others(fsdp) * (passes + again)
            if job.is_trained(path) and _trains(job):
                scattered = [axis for axis in axes if axis in BATCH_AXES and axis == "fsdp"]
                summed = math.prod(sizes[axis] for axis in BATCH_AXES if axis not in axes)
                pieces = math.prod(sizes[axis] for axis in scattered)
                reduce += held * _others(pieces) + 2 * held / pieces * _others(summed)
    width = local_tokens * job.model.width * bytes_each * job.model.layers * (2 if _trains(job) else 1)
    shown = sizes["expert"] - 1 if layout.name == "fsdp_expert" else 0
    outputs = job.experts if job.kind == "train-expert" else 1
    tokens += (1 + outputs) * width * shown + 2 * 2 * width * sizes["expert"] * _others(sizes["tensor"])
    return Traffic(*(job.run.accumulation * part for part in (gather, reduce, tokens)))


def _trains(job: Job) -> bool:
    return job.kind in TRAINING


def _others(pieces: int) -> float:
    """The share of a whole in so many pieces that a device does not have."""
    return (pieces - 1) / pieces


def _names(axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()
