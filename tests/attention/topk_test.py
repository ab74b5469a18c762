"""Top-k attention: against dense formulas, its certificate, and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxattn import _compat
from jaxattn.attention.topk import TopKInfo, topk_attention
from tests._recompile import no_recompilation, quick_jit


def _inputs(t, s, *, n=1, kv=1, h=8, hv=5, batch=(), dtype="float64", seed=0):
  rng = np.random.default_rng(seed)
  shapes = (*batch, t, n, h), (*batch, s, kv, h), (*batch, s, kv, hv)
  return [rng.standard_normal(x).astype(dtype) for x in shapes]


def _logits(query, key, *, is_causal=False, mask=None, xp=np):
  """(..., N, T, S), hidden ones -inf."""
  key = xp.repeat(key, query.shape[-2] // key.shape[-2], axis=-2)
  logits = xp.einsum("...tnh,...snh->...nts", query, key)
  logits = logits / np.sqrt(query.shape[-1])
  t, s = logits.shape[-2:]
  seen = np.tri(t, s, dtype=bool) if is_causal else np.ones((t, s), bool)
  seen = np.broadcast_to(seen, logits.shape)
  if mask is not None:
    seen = seen & mask
  return xp.where(seen, logits, -np.inf)


def _selected(logits, k):
  """Boolean (..., S): the k largest by value and then by index, if visible."""
  order = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
  chosen = np.zeros(logits.shape, bool)
  np.put_along_axis(chosen, order, True, -1)
  return chosen & (logits > -np.inf)


def _indices(chosen, k):
  """Ascending indices of each row, filled up with S."""
  s = chosen.shape[-1]
  return np.sort(np.where(chosen, np.arange(s), s), -1)[..., :k]


def _softmax(logits, where, xp=np):
  """Softmax over ``where``, and 0 for a row of which nothing is there."""
  logits = xp.where(where, logits, -np.inf)
  peak = xp.max(logits, -1, keepdims=True)
  peak = xp.where(xp.isfinite(peak), peak, 0)
  weights = xp.where(where, xp.exp(xp.where(where, logits - peak, 0)), 0)
  total = weights.sum(-1, keepdims=True)
  return weights / xp.where(total == 0, 1, total)


def _output(weights, value, xp=np):
  """(..., T, N, Hv) from weights (..., N, T, S)."""
  value = xp.repeat(value, weights.shape[-3] // value.shape[-2], axis=-2)
  return xp.einsum("...nts,...snh->...tnh", weights, value)


def _dense(query, key, value, k, **options):
  """Output, tail mass (..., T, N) and indices of the dense computation."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  logits = _logits(query, key, **options)
  chosen = _selected(logits, k)
  full = _softmax(logits, logits > -np.inf)
  tail = np.where(chosen, 0, full).sum(-1)
  out = _output(_softmax(logits, chosen), value)
  indices = _indices(chosen, k)
  return out, np.moveaxis(tail, -2, -1), np.moveaxis(indices, -3, -2)


# --- identity and bound of the certificate ---


@pytest.mark.parametrize("k", [1, 2, 100, 256, 257])
def test_error_is_tail_mass_times_difference_of_means(k):
  query, key, value = _inputs(40, 257)
  out_k, info = topk_attention(query, key, value, k=k, return_info=True)
  logits = _logits(query, key)
  chosen = _selected(logits, k)
  out = _output(_softmax(logits, True), value)
  head = _output(_softmax(logits, chosen), value)
  tail = _output(_softmax(logits, ~chosen), value)
  np.testing.assert_allclose(
    out - out_k, info.tail_mass[..., None] * (tail - head), atol=1e-12
  )
  np.testing.assert_allclose(out_k, head, atol=1e-12)


def test_bound_holds_on_1000_rows_and_is_reached():
  query, key, value = _inputs(1000, 257, seed=1)
  query *= np.linspace(0.1, 8, 1000)[:, None, None]
  logits = _logits(query, key)
  exact = _output(_softmax(logits, True), value)
  for k in (1, 16, 128):
    out_k, info = topk_attention(query, key, value, k=k, return_info=True)
    error = np.abs(exact - out_k).max(-1)
    assert (error <= info.bound * (1 + 1e-9) + 1e-14).all()
  # Values that tell the head from the tail of one row reach the bound.
  row = slice(17, 18)
  sign = np.where(_selected(logits[0, 17], 16), 1.0, -1.0)[:, None, None]
  out_k, info = topk_attention(query[row], key, sign, k=16, return_info=True)
  exact = _output(_softmax(logits[:, row], True), sign)
  np.testing.assert_allclose(np.abs(exact - out_k)[..., 0], info.bound)


@pytest.mark.any_x64
def test_all_keys_is_exact_attention_and_one_is_the_nearest_value():
  args = _inputs(16, 50, n=4, kv=2, hv=8, batch=(2,), dtype="float32")
  want = jax.nn.dot_product_attention(*map(jnp.asarray, args))
  np.testing.assert_allclose(topk_attention(*args, k=50), want, atol=1e-6)
  query, key, value = args
  best = np.argmax(_logits(query, key), -1)
  nearest = np.take_along_axis(
    np.repeat(value, 2, axis=2), np.moveaxis(best, 1, 2)[..., None], axis=1
  )
  np.testing.assert_allclose(topk_attention(*args, k=1), nearest, atol=1e-6)


# --- one selection, whatever the path ---


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("s", [1, 7, 1024, 5000])
def test_streaming_is_the_full_selection(s, is_causal):
  # Under a causal mask most of the queries see fewer than k keys.
  query, key, value = _inputs(10, s, n=4, kv=2, batch=(2,))
  k = min(s, 300)  # more than fit into one block

  @quick_jit
  def both(*args):
    call = functools.partial(
      topk_attention, k=k, is_causal=is_causal, return_info=True
    )
    return call(*args, chunk_size=s), call(*args, chunk_size=256)

  (full, full_info), (streamed, info) = both(query, key, value)
  out, tail, indices = _dense(query, key, value, k, is_causal=is_causal)
  np.testing.assert_array_equal(info.indices, full_info.indices)
  np.testing.assert_array_equal(info.indices, indices)
  np.testing.assert_allclose(streamed, full, rtol=0, atol=1e-12)
  np.testing.assert_allclose(streamed, out, rtol=0, atol=1e-12)
  np.testing.assert_allclose(info.tail_mass, tail, rtol=0, atol=1e-12)
  np.testing.assert_allclose(
    info.bound, 2 * info.tail_mass * _largest(value), rtol=1e-12
  )


def _largest(value):
  """Largest |v| of each query head: (B, 1, N)."""
  return np.repeat(np.abs(value).max((1, 3)), 2, axis=-1)[:, None]


@pytest.mark.any_x64
@pytest.mark.parametrize("t", [1, 30])
@pytest.mark.parametrize("chunk_size", [None, 16, 33])
def test_ties_go_to_the_lower_index(chunk_size, t):
  query, key, value = _inputs(t, 100, h=2, dtype="float32")
  query, key = np.round(query), np.round(key)
  _, info = topk_attention(
    query, key, value, k=37, chunk_size=chunk_size, scale=1, return_info=True
  )
  logits = np.round(_logits(query, key) * np.sqrt(2))
  want = _indices(_selected(logits, 37), 37)
  np.testing.assert_array_equal(info.indices, np.moveaxis(want, 0, 1))


@pytest.mark.any_x64
@pytest.mark.parametrize(
  "shape", [(2, 4, 20, 90), (1, 4, 1, 90), (2, 1, 20, 1), (1, 1, 20, 90)]
)
def test_masks(shape):
  args = _inputs(20, 90, n=4, kv=2, batch=(2,), dtype="float32")
  rng = np.random.default_rng(3)
  mask = rng.random(shape) < 0.3
  mask[..., 4:6, :] = False
  for chunk_size in (None, 32):
    out, info = topk_attention(
      *args, k=25, mask=mask, chunk_size=chunk_size, return_info=True
    )
    want, tail, indices = _dense(*args, 25, mask=mask)
    np.testing.assert_array_equal(info.indices, indices)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(info.tail_mass, tail, atol=1e-5)


# --- degenerate rows ---


@pytest.mark.any_x64
def test_one_huge_logit_leaves_no_tail():
  query = jnp.ones((3, 1, 1), "float32")
  key = jnp.zeros((50, 1, 1), "float32").at[7].set(1e4)
  value = jnp.arange(50, dtype="float32")[:, None, None]
  out, info = topk_attention(
    query, key, value, k=3, chunk_size=20, return_info=True
  )
  np.testing.assert_array_equal(out, np.full((3, 1, 1), 7))
  np.testing.assert_array_equal(info.tail_mass, np.zeros((3, 1)))
  np.testing.assert_array_equal(info.bound, np.zeros((3, 1)))


@pytest.mark.any_x64
def test_hidden_rows_give_zero_with_zero_gradient():
  args = _inputs(6, 40, n=2, kv=2, dtype="float32")
  mask = np.ones((2, 6, 40), bool)
  mask[0, 2:4] = False

  def loss(query, key, value):
    out, info = topk_attention(
      query, key, value, k=5, mask=mask, chunk_size=16, return_info=True
    )
    return (out**2).sum(), (out, info)

  gradient = jax.grad(loss, (0, 1, 2), has_aux=True)
  grads, (out, info) = quick_jit(gradient)(*args)
  assert not out[2:4, 0].any()
  assert out[2:4, 1].any()
  assert not info.tail_mass[2:4, 0].any()
  assert (info.indices[2:4, 0] == 40).all()
  assert not grads[0][2:4, 0].any()
  assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.any_x64
def test_nan_in_hidden_keys_is_never_read_and_elsewhere_is_seen():
  query, key, value = _inputs(6, 40, dtype="float32")
  mask = np.broadcast_to(np.arange(40) < 30, (1, 6, 40))

  @quick_jit
  def gradients(query, key, value):
    call = functools.partial(topk_attention, k=35, mask=mask, chunk_size=16)
    out, vjp = jax.vjp(call, query, key, value)
    return out, *vjp(jnp.ones_like(out))

  want = gradients(query, key, value)
  key[30:], value[30:] = np.nan, np.nan
  got = gradients(query, key, value)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(g[:30], w[:30])
  key[3] = np.nan
  assert np.isnan(topk_attention(query, key[:30], value[:30], k=4)).all()


# --- gradients ---


@pytest.mark.parametrize("chunk_size", [None, 32])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradient_is_that_of_the_masked_softmax(chunk_size, is_causal):
  args = _inputs(30, 90, n=4, kv=2, batch=(2,))
  chosen = _selected(_logits(*args[:2], is_causal=is_causal), 20)
  weight = np.random.default_rng(4).standard_normal((2, 30, 4, 5))

  def sparse(*args):
    out = topk_attention(
      *args, k=20, is_causal=is_causal, chunk_size=chunk_size
    )
    return (out * weight).sum()

  def dense(query, key, value):
    weights = _softmax(_logits(query, key, xp=jnp), chosen, jnp)
    return (_output(weights, value, jnp) * weight).sum()

  got = quick_jit(jax.grad(sparse, (0, 1, 2)))(*args)
  want = quick_jit(jax.grad(dense, (0, 1, 2)))(*args)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-12)
  never = ~chosen.reshape(2, 2, -1, 90).any(2)  # (B, K, S)
  for g in got[1:]:
    assert not np.moveaxis(np.asarray(g), 2, 1)[never].any()


def test_second_derivatives_and_forward_mode():
  query, key, value = _inputs(4, 30, seed=5)
  chosen = _selected(_logits(query, key), 6)

  def sparse(query):
    return (topk_attention(query, key, value, k=6, chunk_size=8) ** 3).sum()

  def dense(query):
    weights = _softmax(_logits(query, key, xp=jnp), chosen, jnp)
    return (_output(weights, value, jnp) ** 3).sum()

  got = quick_jit(jax.jacfwd(jax.grad(sparse)))(query)
  want = quick_jit(jax.hessian(dense))(query)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)


@pytest.mark.any_x64
def test_many_tiles_of_queries():
  # Long enough that queries are cut into tiles both to select and to attend.
  query, key, value = _inputs(203, 1100, n=2, h=64, dtype="float32", seed=6)

  def loss(query, key, value):
    out = topk_attention(query, key, value, k=300, chunk_size=1000)
    return (out**2).sum()

  gradient = quick_jit(jax.value_and_grad(loss, (0, 1, 2)))
  got = gradient(query, key, value)
  few = [gradient(query[i : i + 29], key, value) for i in range(0, 203, 29)]
  np.testing.assert_allclose(got[0], sum(f[0] for f in few), rtol=1e-5)
  want = np.concatenate([f[1][0] for f in few])
  np.testing.assert_allclose(got[1][0], want, atol=1e-5)
  for i in (1, 2):
    np.testing.assert_allclose(got[1][i], sum(f[1][i] for f in few), atol=1e-4)


# --- what a caller relies on ---


@pytest.mark.any_x64
def test_info_of_16_bit_inputs_is_float32():
  args = _inputs(3, 20, n=2, batch=(2,), dtype="bfloat16")
  out, info = topk_attention(*args, k=4, return_info=True)
  assert out.dtype == jnp.bfloat16
  assert isinstance(info, TopKInfo)
  assert info.tail_mass.dtype == info.bound.dtype == jnp.float32
  assert info.tail_mass.shape == info.bound.shape == (2, 3, 2)
  assert info.indices.shape == (2, 3, 2, 4)
  assert info.indices.dtype == jnp.int32


@pytest.mark.any_x64
def test_memory_is_a_fraction_of_the_scores():
  shapes = [(1, n, 1, 64) for n in (256, 16384, 16384)]
  args = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
  call = jax.jit(functools.partial(topk_attention, k=128))
  compiled = call.lower(*args).compile()
  scores = 256 * 16384 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < scores / 8


@pytest.mark.any_x64
def test_compiles_once():
  args = _inputs(4, 30, dtype="float32")
  call = functools.partial(topk_attention, k=3, return_info=True)
  jax.block_until_ready(call(*args, scale=0.5))
  with no_recompilation():
    call(*(a + 1 for a in args), scale=0.25)


@pytest.mark.any_x64
def test_info_under_shard_map():
  args = _inputs(16, 90, n=2, kv=1, batch=(8,), dtype="float32")
  call = functools.partial(
    topk_attention, k=70, chunk_size=32, is_causal=False, return_info=True
  )
  mesh = _compat.make_mesh((8,), ("x",), axis_types=(_compat.AxisType.Auto,))
  for queries, keys in ((P("x"), P("x")), (P(None, "x"), P())):
    sharded = _compat.shard_map(
      call,
      mesh=mesh,
      in_specs=(queries, keys, keys),
      out_specs=(queries, TopKInfo(queries, queries, queries)),
      check_vma=True,
    )
    got, want = jax.jit(sharded)(*args), call(*args)
    np.testing.assert_array_equal(got[1].indices, want[1].indices)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5), got, want
    )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"k": 0}, r"k must be in \[1, 1024\], got 0"),
    ({"k": 2048}, r"k must be in \[1, 1024\], got 2048"),
    ({"k": 2.0}, r"k must be an integer in \[1, 1024\], got 2.0"),
    ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
    ({"chunk_size": 8.0}, "chunk_size must be an integer >= 1, got 8.0"),
    ({"implementation": "cuda"}, "implementation must be one of None, 'xla'"),
    ({"scale": np.ones(4)}, "scale must be a real scalar, got array"),
    ({"is_causal": 1}, "is_causal must be one of False, True, got 1"),
    ({"mask": np.ones((3, 1024), bool)}, "mask must be broadcastable to"),
    ({"mask": np.ones((1, 3, 1024), bool)}, "mask must be broadcastable to"),
    ({"mask": np.ones((1, 4, 1024))}, "mask must be boolean"),
  ],
)
def test_refused(options, message):
  args = _inputs(4, 1024)
  with pytest.raises(ValueError, match=message):
    topk_attention(*args, **({"k": 16} | options))
