"""ReLU attention: against the dense formula, its zeros, its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn.attention import relu_attention
from tests._recompile import no_recompilation, quick_jit


def _inputs(t, s, *, n=1, kv=1, h=8, hv=5, batch=(), dtype="float64", seed=0):
  rng = np.random.default_rng(seed)
  shapes = (*batch, t, n, h), (*batch, s, kv, h), (*batch, s, kv, hv)
  return [rng.standard_normal(x).astype(dtype) for x in shapes]


def _dense(query, key, value, threshold=0.0, *, alpha, seen=True, xp=jnp):
  """The definition, every score at once; ``threshold`` () or (..., T, N)."""
  groups = query.shape[-2] // key.shape[-2]
  key, value = (xp.repeat(x, groups, axis=-2) for x in (key, value))
  scores = xp.einsum("...tnh,...snh->...nts", query, key)
  scores = scores / np.sqrt(query.shape[-1])
  threshold = xp.broadcast_to(threshold, query.shape[:-1])
  excess = scores - xp.swapaxes(threshold, -1, -2)[..., None]
  weights = xp.where(seen & (excess > 0), excess, 0) ** alpha
  total = weights.sum(-1, keepdims=True)
  weights = weights / xp.where(total == 0, 1, total)
  return xp.einsum("...nts,...snh->...tnh", weights, value)


@pytest.mark.parametrize("alpha", [1, 2, 3])
@pytest.mark.parametrize("threshold", [-10.0, -0.3, 0.0, 1.0, 30.0])
def test_values_from_all_pass_to_none(threshold, alpha):
  args = _inputs(40, 700, n=4, kv=2, batch=(2,))
  got = relu_attention(*args, threshold=threshold, alpha=alpha)
  want = _dense(*args, threshold, alpha=alpha, xp=np)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  assert (threshold == 30) == (not got.any())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("alpha", [1, 3])
def test_gradients_over_blocks_and_tiles(alpha, is_causal):
  # Three blocks of keys, the first of them short, and two tiles of queries.
  args = _inputs(203, 1100, n=2, batch=(2,))
  rng = np.random.default_rng(1)
  threshold = rng.standard_normal((2, 203, 2))
  weight = rng.standard_normal((2, 203, 2, 5))
  seen = np.tri(203, 1100, dtype=bool)[None, None] if is_causal else True

  def tiled(threshold, *args):
    out = relu_attention(
      *args, threshold=threshold, alpha=alpha, is_causal=is_causal
    )
    return (out * weight).sum()

  def dense(threshold, *args):
    return (_dense(*args, threshold, alpha=alpha, seen=seen) * weight).sum()

  got = quick_jit(jax.value_and_grad(tiled, (0, 1, 2, 3)))(threshold, *args)
  want = quick_jit(jax.value_and_grad(dense, (0, 1, 2, 3)))(threshold, *args)
  # A causal row may hold one small weight: then its derivative is large.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10),
    got,
    want,
  )


def test_second_derivatives_and_forward_mode():
  query, key, value = _inputs(4, 600, seed=5)

  def curvature(attend, jacobian):
    return jacobian(jax.grad(lambda q: (attend(q, key, value) ** 3).sum()))

  attend = functools.partial(relu_attention, alpha=2, implementation="xla")
  got = quick_jit(curvature(attend, jax.jacfwd))(query)
  want = quick_jit(curvature(functools.partial(_dense, alpha=2), jax.jacfwd))(
    query
  )
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
  attend = functools.partial(relu_attention, alpha=2)
  got = quick_jit(curvature(attend, jax.jacrev))(query)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.any_x64
def test_nothing_passes_gives_zero_with_zero_gradient():
  args = _inputs(6, 40, n=2, kv=2, dtype="float32")
  threshold = np.zeros((6, 2), np.float32)
  threshold[2:4, 0] = 1e3

  def loss(threshold, *args):
    out = relu_attention(*args, threshold=threshold)
    return (out**2).sum(), out

  gradient = jax.grad(loss, (0, 1, 2, 3), has_aux=True)
  grads, out = quick_jit(gradient)(threshold, *args)
  assert not out[2:4, 0].any()
  assert out[2:4, 1].any()
  assert not grads[0][2:4, 0].any()
  assert not grads[1][2:4, 0].any()
  assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.any_x64
@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e6])
def test_weights_of_any_size_neither_vanish_nor_overflow(factor):
  # Without a threshold the scale of the queries cancels, at any power.
  query, key, value = _inputs(9, 70, dtype="float32")
  want = _dense(query, key, value, alpha=6, xp=np)
  got = relu_attention(np.float32(factor) * query, key, value, alpha=6)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.any_x64
@pytest.mark.parametrize("hidden", [False, True])
def test_keys_without_weight_do_not_set_the_scale(hidden):
  """One key of moderate score beside one of a million that does not count."""
  query, value = np.float32([1, 1]), np.float32([5, 7])
  key = np.float32([1, 1e6 if hidden else -1e6])
  query, key, value = (x.reshape(-1, 1, 1) for x in (query, key, value))
  mask = np.array([[[True, not hidden]]])

  def out(query, key, value):
    return relu_attention(query, key, value, alpha=8, mask=mask)

  got, vjp = jax.vjp(out, query, key, value)
  np.testing.assert_array_equal(got, np.full_like(value, 5))
  # The one weight cancels: only its value has a gradient.
  dq, dk, dv = vjp(np.ones_like(got))
  np.testing.assert_allclose(dq, 0, atol=1e-5)
  np.testing.assert_allclose(dk, 0, atol=1e-5)
  np.testing.assert_array_equal(dv.ravel(), [2, 0])


@pytest.mark.any_x64
def test_keys_below_the_threshold_do_not_count():
  query, key, value = _inputs(5, 60, dtype="float32")
  scores = np.einsum("tnh,snh->ts", query, key) / np.sqrt(8)
  below = scores.max(0) < 0.5
  assert 5 < below.sum() < 55
  want = relu_attention(query, key, value, threshold=0.5)
  value[below] = 1e6
  got = relu_attention(query, key, value, threshold=0.5)
  np.testing.assert_array_equal(got, want)


@pytest.mark.any_x64
def test_memory_is_linear_also_for_the_gradient():
  def temporary(length):
    shapes = [jax.ShapeDtypeStruct((length, 1, 32), "float32")] * 3

    def loss(*args):
      return relu_attention(*args, alpha=2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporary(2048), temporary(8192)
  assert long < 4.5 * short
  assert long < 8192**2 * 4 / 16


@pytest.mark.parametrize("alpha", [1, 3])
def test_interpreted_kernels_equal_the_tiles_in_xla(alpha):
  # All gradients, of one scale too; a query's threshold is its own.
  args = _inputs(5, 9, n=4, kv=2, batch=(2,))
  threshold = np.random.default_rng(1).standard_normal((2, 5, 4))

  def loss(implementation, threshold, scale, *args):
    out = relu_attention(
      *args,
      threshold=threshold,
      scale=scale,
      alpha=alpha,
      is_causal=True,
      implementation=implementation,
    )
    return (out**2).sum()

  got, want, plain = (
    quick_jit(
      jax.value_and_grad(functools.partial(loss, name), (0, 1, 2, 3, 4))
    )(threshold, 0.4, *args)
    for name in ("pallas_interpret", None, "xla")
  )
  for other in (got, plain):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
      other,
      want,
    )


@pytest.mark.any_x64
@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_a_tpu_takes_the_kernels(implementation):
  def loss(*args):
    return relu_attention(*args, implementation=implementation).sum()

  shapes = [jax.typeof(x) for x in _inputs(9, 30, dtype="float32")]
  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  # Forward, queries, keys and values; no loop of the XLA path.
  assert text.count("@tpu_custom_call") == 3
  assert "stablehlo.while" not in text


def test_kernels_are_refused_where_they_cannot_run():
  for dtype, message in (
    ("float32", "it needs a TPU or an NVIDIA GPU; 'xla' and"),
    ("float64", "takes float32 or bfloat16, got float64"),
  ):
    with pytest.raises(NotImplementedError, match=message):
      relu_attention(*_inputs(4, 9, dtype=dtype), implementation="pallas")


def test_kernels_need_a_shard_map_on_an_explicit_mesh():
  mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
  x = jax.ShapeDtypeStruct(
    (2, 4, 1, 8), jnp.bfloat16, sharding=NamedSharding(mesh, P("x"))
  )
  attend = functools.partial(relu_attention, implementation="pallas")
  with pytest.raises(
    NotImplementedError,
    match=r"here: a mesh with explicit axes needs jax.shard_map around the "
    r"call(?!;)",
  ):
    jax.eval_shape(attend, x, x, x)


@pytest.mark.any_x64
def test_compiles_once():
  args = _inputs(4, 30, dtype="float32")
  jax.block_until_ready(relu_attention(*args, threshold=0.5, scale=0.5))
  with no_recompilation():
    relu_attention(*(a + 1 for a in args), threshold=0.25, scale=0.25)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"alpha": 0}, "alpha must be >= 1, got 0"),
    ({"alpha": 1.5}, "alpha must be an integer >= 1, got 1.5"),
    ({"threshold": "low"}, "threshold must be a real scalar, got 'low'"),
    ({"threshold": np.ones(4)}, r"threshold must have shape \(4, 1\) = \(T, N"),
    ({"threshold": np.ones((4, 1), int)}, "threshold must have a floating"),
    ({"scale": np.ones(4)}, "scale must be a real scalar, got array"),
    ({"is_causal": 1}, "is_causal must be one of False, True, got 1"),
    ({"implementation": "fast"}, "implementation must be one of None, 'xla'"),
    ({"mask": np.ones((1, 4, 9))}, "mask must be boolean"),
    ({"mask": np.ones((1, 3, 9), bool)}, "mask must be broadcastable to"),
  ],
)
def test_refused(options, message):
  with pytest.raises(ValueError, match=message):
    relu_attention(*_inputs(4, 9), **options)
