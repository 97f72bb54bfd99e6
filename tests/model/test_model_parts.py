"""Packed documents, the bias channel, the shape's checks, parameter counts and the predicate over paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.errors import UserError
from flexolmo_jax.model import PUBLIC, ModelConfig, abstract_params, builder, initialise
from flexolmo_jax.model.bias_channel import fold, is_pinned, pin
from flexolmo_jax.model.partition import belongs_to_anchor, belongs_to_expert, flatten, join, split, unflatten

CONFIG = ModelConfig(vocab_size=31, width=16, hidden=24, layers=3, heads=2, kv_heads=2, bias_channel=True)
BUILD = builder(CONFIG, (PUBLIC, "math"))


def test_packed_documents_do_not_see_each_other():
    params = initialise(CONFIG, (PUBLIC, "math"), seed=0)
    rng = np.random.default_rng(0)
    first, second = jnp.asarray(rng.integers(0, 31, 5)), jnp.asarray(rng.integers(0, 31, 4))
    tokens = jnp.concatenate([first, second])[None]
    positions = jnp.array([[*range(5), *range(4)]])
    segments = jnp.array([[1] * 5 + [2] * 4])
    model = BUILD(params)
    packed = model.unembed(model.trace(tokens, positions, segments).hidden)[0]
    np.testing.assert_allclose(packed[:5], model(first[None])[0], atol=1e-5)
    np.testing.assert_allclose(packed[5:], model(second[None])[0], atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(remat):
    params = initialise(CONFIG, (PUBLIC, "math"), seed=0)
    tokens = jnp.arange(12).reshape(2, 6)

    def gradient(**options):
        build = builder(CONFIG, (PUBLIC, "math"), **options)
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(build(params)(tokens)))))(params)

    for ours, plain in zip(jax.tree.leaves(gradient(remat=remat)), jax.tree.leaves(gradient()), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_first_block_apart_changes_nothing_but_the_program(remat):
    params = initialise(CONFIG, (PUBLIC, "math"), seed=0)
    tokens = jnp.arange(12).reshape(2, 6)

    def traced(params, **options):
        model = builder(CONFIG, (PUBLIC, "math"), remat=remat, **options)(params)
        positions = jnp.broadcast_to(jnp.arange(6), tokens.shape)
        trace = model.trace(tokens, positions, jnp.zeros_like(tokens))
        return jnp.sum(jnp.square(model.unembed(trace.hidden))), trace

    apart = functools.partial(traced, first_block_apart=True)
    ours, plain = (jax.value_and_grad(each, has_aux=True)(params) for each in (apart, traced))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_router_and_logits_in_float32():
    params = initialise(CONFIG, (PUBLIC, "math"), seed=0)
    tokens = jnp.arange(6)[None]
    model = builder(CONFIG, (PUBLIC, "math"), compute_dtype=jnp.bfloat16)(params)
    trace = model.trace(tokens, tokens, jnp.zeros_like(tokens))
    assert trace.hidden.dtype == jnp.bfloat16
    assert trace.routing.logits.dtype == trace.routing.probabilities.dtype == jnp.float32
    logits = model.unembed(trace.hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, BUILD(params)(tokens), atol=0.05)


def test_the_pinned_channel_is_one_in_every_layer_and_holds_the_bias():
    params = pin(initialise(CONFIG, (PUBLIC, "math"), seed=0))
    assert is_pinned(params) and not is_pinned(initialise(CONFIG, (PUBLIC,), seed=0))
    params["router"]["math"]["bias"] = jnp.array([-0.5, 0.7, -3.0])
    params["router"]["math"]["row"] = jax.random.normal(jax.random.key(1), (3, 16))
    tokens = jnp.arange(9)[None]
    model = BUILD(params)
    trace = model.trace(tokens, tokens, jnp.zeros_like(tokens))
    assert np.all(np.asarray(trace.router_inputs)[..., 0] == 1.0)
    rows = params["router"]["math"]
    folded = {"row": fold(rows["row"], rows["bias"]), "bias": jnp.zeros(3)}
    other = BUILD({**params, "router": {**params["router"], "math": folded}})
    np.testing.assert_allclose(model(tokens), other(tokens), atol=1e-5)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"width": 15}, "heads do not divide"),
        ({"kv_heads": 3}, "kv_heads do not divide"),
        ({"layers": 0}, "ModelConfig.layers"),
        ({"hidden": True}, "ModelConfig.hidden"),
        ({"width": 6}, "even number"),
    ],
)
def test_an_impossible_shape_is_named(change, says):
    shape = dict(vocab_size=8, width=16, hidden=8, layers=1, heads=2, kv_heads=2) | change
    with pytest.raises(UserError, match=says):
        ModelConfig(**shape)


@given(
    layers=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (4, 1), (4, 4)]),
    hidden=st.integers(1, 9),
    owners=st.integers(0, 4),
)
@settings(max_examples=20, deadline=None)
def test_parameter_counts_are_exact(layers, heads, hidden, owners):
    config = ModelConfig(vocab_size=7, width=8, hidden=hidden, layers=layers, heads=heads[0], kv_heads=heads[1])
    names = (PUBLIC, *(f"owner{i}" for i in range(owners)))
    leaves = flatten(abstract_params(config, names))
    assert config.num_params(len(names)) == sum(leaf.size for leaf in leaves.values())
    one_ffn = sum(leaf.size for path, leaf in leaves.items() if path[:2] == ("experts", PUBLIC))
    assert config.num_active_params(1, len(names)) == config.num_params(len(names)) - owners * one_ffn
    assert config.num_active_params(len(names), len(names)) == config.num_params(len(names))


def test_the_predicate_parts_every_leaf_once():
    params = initialise(CONFIG, (PUBLIC, "math", "code"), seed=0)
    mine, rest = split(params, lambda path: belongs_to_expert(path, "math"))
    assert {"/".join(path) for path in flatten(mine)} == {
        "experts/math/gate",
        "experts/math/up",
        "experts/math/down",
        "router/math/row",
        "router/math/bias",
    }
    assert flatten(join(mine, rest)).keys() == flatten(params).keys()
    assert not any(belongs_to_anchor(path) for path in flatten(mine))
    assert unflatten(flatten(params)).keys() == params.keys()
    with pytest.raises(ValueError, match="share experts/math/down"):
        join(mine, params)
