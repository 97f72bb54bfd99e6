"""The step: only the owner's part is differentiated, accumulation changes nothing, and the formulas hold."""

import dataclasses
from platform import machine

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexolmo_jax.data.packing import Rows
from flexolmo_jax.data.reading import Batch
from flexolmo_jax.model import PUBLIC, builder
from flexolmo_jax.model.bias_channel import pin
from flexolmo_jax.model.partition import belongs_to_expert, belongs_to_router, flatten, split
from flexolmo_jax.train.expert_objective import DECOY, FOREIGN, OWN, ExpertTraining, RestraintConfig
from flexolmo_jax.train.objective import LanguageModelling, ObjectiveConfig
from flexolmo_jax.train.optimizer import OptimizerConfig
from flexolmo_jax.train.step import TrainState, jit_step, make_step
from flexolmo_jax.train.token_losses import token_losses
from tests.small import CONFIG, random_params

NAMES = (PUBLIC, "math")
BUILD = builder(CONFIG, NAMES)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.0)
TASK = ExpertTraining("math", ObjectiveConfig(), RestraintConfig(domain_loss=0.3, stillness_loss=2.0))


def batch_of(rows=6, length=12, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(3, 259, (rows, length + 1)))
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    weights = jnp.asarray(rng.random((rows, length)) < 0.8, jnp.float32)
    packed = Rows(tokens[:, :-1], tokens[:, 1:], positions, jnp.ones((rows, length), jnp.int32), weights)
    return Batch(packed, jnp.asarray([OWN, FOREIGN, DECOY] * (rows // 3)))


def parts(predicate=lambda path: belongs_to_expert(path, "math")):
    return split(jax.tree.map(jnp.asarray, random_params("math")), predicate)


def run(task, batch, *, predicate=lambda path: belongs_to_expert(path, "math"), steps=1, **options):
    trainable, frozen = parts(predicate)
    optimizer = OPTIMIZER.build(10)
    state = TrainState(trainable, optimizer.init(trainable))
    step = jit_step(make_step(BUILD, task.weigh, task.loss, optimizer, **options), state)
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
    return state, frozen, metrics


@pytest.mark.skipif(machine() != "x86_64", reason="oneDNN is asked for on x86 alone")
def test_a_step_on_cpu_has_the_products_of_onednn():
    trainable, frozen = parts()
    optimizer = OPTIMIZER.build(10)
    state = TrainState(trainable, optimizer.init(trainable))
    step = jit_step(make_step(BUILD, TASK.weigh, TASK.loss, optimizer), state)
    assert "__onednn_fusion" in step.lower(state, frozen, batch_of()).compile().as_text()


def test_optimizer_state_holds_the_trainable_parameters_alone():
    trainable, _ = parts()
    state = OPTIMIZER.build(10).init(trainable)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.nbytes for leaf in moments) == 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))


def test_training_changes_every_trainable_leaf_and_no_frozen_one():
    before, frozen_before = parts()
    state, frozen, _ = run(TASK, batch_of(), steps=3)
    for path, leaf in flatten(state.params).items():
        assert not np.array_equal(leaf, flatten(before)[path]), path
    for path, leaf in flatten(frozen).items():
        np.testing.assert_array_equal(leaf, flatten(frozen_before)[path])


def products_that_make(shape, jaxpr):
    """Matrix products, in this program and in those that it calls, whose result has this shape or its transpose."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.outvars[0].aval.shape in (shape, shape[::-1]):
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products_that_make(shape, inner)


def weight_gradients(predicate, task) -> int:
    """How many products in the step give the gradient of an expert's matrix; nothing else has the size [D, F]."""
    trainable, frozen = parts(predicate)
    optimizer = OPTIMIZER.build(10)
    step = make_step(BUILD, task.weigh, task.loss, optimizer)
    program = jax.make_jaxpr(step)(TrainState(trainable, optimizer.init(trainable)), frozen, batch_of())
    return len([*products_that_make((CONFIG.width, CONFIG.hidden), program.jaxpr)])


def test_the_step_has_no_weight_gradient_of_a_frozen_matrix():
    plain = LanguageModelling(ObjectiveConfig())
    assert weight_gradients(lambda path: True, plain) == 6  # three matrices of both experts, in the scan over layers
    assert weight_gradients(lambda path: belongs_to_expert(path, "math"), plain) == 3
    assert weight_gradients(lambda path: belongs_to_expert(path, "math"), TASK) == 3
    assert weight_gradients(belongs_to_router, plain) == 0


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulation_gives_the_same_step(accumulation):
    whole, _, metrics = run(TASK, batch_of(), steps=2)
    pieces, _, same = run(TASK, batch_of(), steps=2, accumulation=accumulation)
    for path, leaf in flatten(whole.params).items():
        np.testing.assert_allclose(leaf, flatten(pieces.params)[path], atol=3e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], same[name], rtol=1e-4)


def test_a_constraint_holds_after_every_step():
    state, _, _ = run(LanguageModelling(ObjectiveConfig()), batch_of(), predicate=lambda path: True, constrain=pin)
    assert np.all(np.asarray(state.params["anchor"]["embed"])[:, 0] == 1.0)
    assert np.all(np.asarray(state.params["anchor"]["ffn_norm"])[:, 0] == 0.0)


def test_the_expert_objective_follows_its_formula():
    batch, config = batch_of(), TASK._restraint
    params = jax.tree.map(jnp.asarray, random_params("math"))
    model = BUILD(params)
    loss, metrics = TASK.loss(model, batch, TASK.weigh(batch))

    trace = model.trace(batch.rows.inputs, batch.rows.positions, batch.rows.segments)
    nats = np.float64(
        token_losses(trace.hidden, model.head_in(trace.hidden.dtype), batch.rows.targets, 0.0).cross_entropy
    )
    partition = np.float64(jax.nn.logsumexp(model.unembed(trace.hidden), axis=-1))
    logits = np.float64(trace.routing.logits)
    weights, source = np.float64(batch.rows.weights), np.asarray(batch.source)[:, None]
    text, own, foreign = weights * (source != DECOY), weights * (source == OWN), weights * (source != OWN)
    preference = logits[..., 1] - logits[..., 0]
    expected = (nats * text).sum() / text.sum() + 1e-5 * (partition**2 * text).sum() / text.sum()
    expected += 1e-3 * ((np.logaddexp(logits[..., 0], logits[..., 1]) ** 2).mean(0) * text).sum() / text.sum()
    expected += config.domain_loss * np.mean(
        [
            ((np.logaddexp(0, -p) * own).sum() / own.sum() + (np.logaddexp(0, p) * foreign).sum() / foreign.sum()) / 2
            for p in preference
        ]
    )
    stillness = 0.0
    for layer in range(CONFIG.layers):
        x = np.float64(trace.router_inputs[layer])
        outputs = []
        for name in NAMES:
            gate, up, down = (np.float64(params["experts"][name][part][layer]) for part in ("gate", "up", "down"))
            hidden = x @ gate
            outputs.append((hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down)
        share = 1 / (1 + np.exp(-preference[layer]))
        moved = share[..., None] * (outputs[1] - outputs[0])
        distance = (moved**2).sum(-1) / (outputs[0] ** 2).sum(-1)
        stillness += (distance * foreign).sum() / foreign.sum() / CONFIG.layers
    np.testing.assert_allclose(loss, expected + config.stillness_loss * stillness, rtol=1e-4)
    np.testing.assert_allclose(metrics["own_loss"], (nats * own).sum() / own.sum(), rtol=1e-5)


def test_without_restraints_and_public_text_it_is_plain_language_modelling():
    batch = batch_of()._replace(source=jnp.zeros(6, jnp.int32))
    published = ExpertTraining("math", ObjectiveConfig(), RestraintConfig(domain_loss=0.0, stillness_loss=0.0))
    plain = LanguageModelling(ObjectiveConfig())
    model = BUILD(jax.tree.map(jnp.asarray, random_params("math")))
    ours, _ = published.loss(model, batch, published.weigh(batch))
    theirs, _ = plain.loss(model, batch, plain.weigh(batch))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_long_rows_are_scored_piece_by_piece_with_the_same_result(monkeypatch):
    batch = batch_of()
    model = BUILD(jax.tree.map(jnp.asarray, random_params("math")))
    hidden = model.trace(batch.rows.inputs, batch.rows.positions, batch.rows.segments).hidden
    whole = token_losses(hidden, model.head_in(hidden.dtype), batch.rows.targets, 0.1)
    monkeypatch.setattr("flexolmo_jax.train.token_losses.POSITIONS_AT_ONCE", 4)
    pieces = token_losses(hidden, model.head_in(hidden.dtype), batch.rows.targets, 0.1)
    for ours, plain in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5)


def test_the_schedule_warms_up_and_decays_by_half_a_cosine():
    schedule = dataclasses.replace(OPTIMIZER, warmup_steps=10, final_fraction=0.1).schedule(110)
    np.testing.assert_allclose(schedule(5), 0.5e-2, rtol=1e-5)
    np.testing.assert_allclose(schedule(10), 1e-2, rtol=1e-5)
    np.testing.assert_allclose(schedule(60), (1 + 0.1) / 2 * 1e-2, rtol=1e-5)
    np.testing.assert_allclose(schedule(110), 1e-3, rtol=1e-5)


def test_decay_moves_matrices_alone():
    trainable, _ = parts()
    optimizer = dataclasses.replace(OPTIMIZER, weight_decay=0.5).build(10)
    state = optimizer.init(trainable)
    zero = jax.tree.map(jnp.zeros_like, trainable)
    for _ in range(2):
        updates, state = optimizer.update(zero, state, trainable)
    moved = {path for path, leaf in flatten(updates).items() if np.any(np.asarray(leaf))}
    assert {path[-1] for path in moved} == {"gate", "up", "down"}
    assert optax.global_norm(updates) > 0
