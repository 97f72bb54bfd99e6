"""Reading compiled programs: matrix products and loops against XLA's own analysis, and TPU's ways of saying things."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexolmo_jax.plan import hlo, kernels, measures

SIZES = st.integers(2, 24)


def read(function, *shapes) -> tuple[hlo.Module, float]:
    """The compiled program, and the FLOPs that XLA counts in it."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    return hlo.parse(compiled.as_text()), compiled.cost_analysis()["flops"]


@settings(max_examples=6, deadline=None)
@given(b=SIZES, m=SIZES, k=SIZES, n=SIZES)
def test_products_count_as_xla_counts_them(b, m, k, n):
    module, flops = read(lambda x, y: jnp.einsum("bmk,bkn->bmn", x, y), (b, m, k), (b, k, n))
    assert measures.flops(module) == (flops, 0) == (2 * b * m * k * n, 0)


@settings(max_examples=6, deadline=None)
@given(size=st.integers(3, 12), taps=st.integers(1, 5), stride=st.integers(1, 3), holes=st.integers(1, 3))
@example(size=3, taps=1, stride=3, holes=3)
def test_convolutions_count_as_xla_counts_them(size, taps, stride, holes):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,), [(2, 2)], lhs_dilation=(holes,), dimension_numbers=("NWC", "WIO", "NWC")
        )

    text = jax.jit(convolve).lower(jnp.ones((2, size, 3)), jnp.ones((taps, 3, 4))).compile()
    counted = text.cost_analysis().get("flops", 0.0)  # where every product is with a hole, XLA leaves none
    assert measures.flops(hlo.parse(text.as_text())).needed == counted


def test_loops_within_loops_multiply():
    def step(x, w):
        def inner(x, _):
            return jnp.tanh(x @ w), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=4)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    module, counted_once = read(step, (8, 8), (8, 8))
    assert measures.flops(module).needed == 3 * 4 * 2 * 8**3
    assert counted_once < measures.flops(module).needed


def test_what_is_recomputed_is_told_apart():
    @jax.checkpoint
    def block(x, w):
        return jnp.sum(jnp.sin(jnp.sin(x @ w) @ w))

    module, _ = read(jax.grad(block, argnums=1), (8, 8), (8, 8))
    # Of a gradient alone, the forward pass is needed for nothing but itself: only the second time it runs remains.
    assert measures.flops(module) == (3 * 2 * 8**3, 2 * 2 * 8**3)


def test_slices_of_a_large_array_count_as_slices():
    def sums(stacked):
        return jax.lax.map(lambda layer: jnp.sum(jnp.sin(layer)), stacked)

    module, _ = read(sums, (100, 64, 64))
    whole = 100 * 64 * 64 * 4
    assert whole <= measures.memory_traffic(module) <= 4 * whole


TPU = """HloModule tpu, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%batched.1 (x: bf16[3,5,7], y: bf16[3,7,2]) -> bf16[3,5,2] {
  %x = bf16[3,5,7]{2,1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[3,7,2]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[3,5,2]{2,1,0} convolution(%x, %y), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf
}

%begin (p: bf16[4,64]) -> (bf16[4,64], bf16[32,64]) {
  %p = bf16[4,64]{1,0:T(4,128)S(1)} parameter(0)
  %g.1 = bf16[32,64]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=8,'b'=4] {'a'}
  ROOT %t = (bf16[4,64]{1,0}, bf16[32,64]{1,0}) tuple(%p, %g.1)
}

%end (p.1: bf16[4,64]) -> bf16[32,64] {
  %p.1 = bf16[4,64]{1,0:T(4,128)(2,1)} parameter(0)
  ROOT %g.2 = bf16[32,64]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=8,'b'=4] {'a'}
}

%scattered (q: f32[64,8]) -> f32[16,8] {
  %q = f32[64,8]{1,0} parameter(0)
  %r = f32[64,8]{1,0} all-reduce(%q), channel_id=9, replica_groups=[8,4]<=[32], to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %piece = f32[16,8]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={16,8}
}

ENTRY %main (x.1: bf16[3,5,7], y.1: bf16[3,7,2], w: bf16[4,64], z: f32[64,8]) -> f32[16,8] {
  %x.1 = bf16[3,5,7]{2,1,0:T(8,128)(2,1)} parameter(0)
  %y.1 = bf16[3,7,2]{2,1,0:T(8,128)(2,1)} parameter(1)
  %w = bf16[4,64]{1,0:T(4,128)(2,1)} parameter(2)
  %z = f32[64,8]{1,0:T(8,128)} parameter(3)
  %f = bf16[3,5,2]{2,1,0:T(8,128)(2,1)} fusion(%x.1, %y.1), kind=kOutput, calls=%batched.1
  %async-collective-start.1 = (bf16[4,64]{1,0}, bf16[32,64]{1,0}) fusion(%w), kind=kCustom, calls=%begin
  %async-collective-done.1 = bf16[32,64]{1,0} fusion(%w), kind=kCustom, calls=%end
  ROOT %all-reduce-scatter = f32[16,8]{1,0:T(8,128)} fusion(%z), kind=kCustom, calls=%scattered
}
"""


def test_programs_for_tpu_are_read():
    """A batched product as a convolution with holes, a gather in two parts, a reduce-scatter as a sum and a slice."""
    module = hlo.parse(TPU)
    assert measures.flops(module).needed == 2 * 3 * 5 * 7 * 2
    assert measures.traffic(module) == {"all-gather": 7 * 4 * 64 * 2, "reduce-scatter": 64 * 8 * 4 * 3 // 4}
    parameters = 2 * (3 * 5 * 7 + 3 * 7 * 2), 2 * 3 * 5 * 2
    assert measures.memory_traffic(module) >= sum(parameters)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("kernel", "needed", "again"), [("fwd", 2, 0), ("dkv", 3, 1), ("dq", 1, 2)])
def test_splash_attention_counts_the_blocks_it_does_not_pass_over(rows, kernel, needed, again):
    heads, length, width, block = 4, 1024, 128, kernels.SPLASH_BLOCK
    shape = f"{f'{rows},' if rows > 1 else ''}{heads},{length},{width}"
    module = hlo.parse(
        f"""HloModule attention

ENTRY %main (q: bf16[{shape}], s: s32[{length},128]) -> bf16[{shape}] {{
  %s = s32[{length},128] parameter(1)
  %q = bf16[{shape}] parameter(0)
  ROOT %call = bf16[{shape}] custom-call(%s, %q), metadata={{op_name="splash_mha_{kernel}"}}
}}
"""
    )
    below_and_on_the_diagonal = 3
    product = 2 * rows * heads * width * below_and_on_the_diagonal * block**2
    assert measures.flops(module) == (needed * product, again * product)
