"""Prefixes of keys and values: closed forms against automatic derivatives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import prefix_attention, softmax_attention
from jaxattn.ntk import PrefixContext, prefix_ntk, prefix_output
from jaxattn.scaling import fit_slope
from tests._recompile import no_recompilation
from tests.ntk._prefix import BIAS, D, L, M, N, V, context, prefix, queries


def _dense_output(key, value, x, pairs=None, *, bias=BIAS, count=True):
  """A softmax over prefix and context, put together, for one datum."""
  logits = key @ x + bias - (np.log(len(key)) if count else 0)
  if pairs is not None:
    logits = jnp.concatenate((logits, pairs[0] @ x))
    value = jnp.concatenate((value, pairs[1]))
  return jax.nn.softmax(logits) @ value


def _dense_jacobians(key, value, x, pairs, **options):
  fn = functools.partial(_dense_output, **options)
  one = jax.jacrev(fn, argnums=(0, 1))
  return jax.vmap(one, in_axes=(None, None, 0, 0))(key, value, x, pairs)


@jax.jit
def _dense_ntk(key, value, data1, data2):
  """Kernels of keys and of values."""
  left, right = (_dense_jacobians(key, value, *x) for x in (data1, data2))
  return tuple(
    len(key) * jnp.einsum("iamp,jbmp->iajb", a, b) for a, b in zip(left, right)
  )


@pytest.fixture(scope="module")
def case():
  data1 = queries(), context()
  data2 = queries(N + 1, seed=3), context(N + 1, seed=4)
  return (*prefix(), data1, data2)


def test_output(case):
  key, value, (x, pairs), _ = case
  for own in (pairs, None):
    for options in ({}, {"count": False}, {"bias": -1.0}):
      fn = functools.partial(_dense_output, key, value, **options)
      want = jax.vmap(fn)(x, own) if own else jax.vmap(fn)(x)
      got = prefix_output(
        key,
        value,
        x,
        own,
        prefix_bias=options.get("bias", BIAS),
        count_normalized=options.get("count", True),
      )
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)


def test_kernel_is_that_of_its_parameters(case):
  key, value, (x1, context1), (x2, context2) = case
  want_key, want_value = _dense_ntk(key, value, *case[2:])
  ntk = functools.partial(
    prefix_ntk, key, value, x1, x2, context1, context2, prefix_bias=BIAS
  )
  both = ntk()
  assert both.shape == (N, V, N + 1, V)
  np.testing.assert_allclose(both, want_key + want_value, rtol=0, atol=1e-12)
  parts = [ntk(train=(name,)) for name in ("key", "value")]
  np.testing.assert_allclose(parts[0], want_key, rtol=0, atol=1e-12)
  np.testing.assert_allclose(parts[1], want_value, rtol=0, atol=1e-12)
  # Exactly what the joint kernel adds up.
  np.testing.assert_allclose(parts[0] + parts[1], both, rtol=1e-15, atol=0)
  for chunk_size in (1, 7, 1000):
    np.testing.assert_allclose(
      ntk(chunk_size=chunk_size), both, rtol=0, atol=1e-13
    )
  # One set of data twice, of which only one half is computed.
  want = sum(_dense_ntk(key, value, case[2], case[2]))
  got = prefix_ntk(key, value, x1, None, context1, prefix_bias=BIAS)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  eigenvalues = np.linalg.eigvalsh(np.reshape(got, (N * V, N * V)))
  assert eigenvalues[0] > -1e-9 * eigenvalues[-1]


def test_contexts_that_are_shared_summarized_or_empty(case):
  key, value, (x, pairs), _ = case
  shared = pairs[0][0], pairs[1][0]
  copies = [np.broadcast_to(y, (N, *y.shape)) for y in shared]
  ntk = functools.partial(prefix_ntk, key, value, x, None)
  np.testing.assert_allclose(
    ntk(shared), ntk(tuple(copies)), rtol=0, atol=1e-14
  )
  # One causal pass over a sequence holds the contexts of its positions.
  sequence = queries(L, seed=5)
  output, log_mass = softmax_attention(
    sequence[:, None],
    pairs[0][0][:, None],
    pairs[1][0][:, None],
    scale=1.0,
    is_causal=True,
    return_residual=True,
  )
  causal = PrefixContext(output[:, 0], log_mass[:, 0])
  for t in (0, L - 1):
    own = pairs[0][0][: t + 1], pairs[1][0][: t + 1]
    np.testing.assert_allclose(
      prefix_output(key, value, sequence, causal)[t],
      prefix_output(key, value, sequence[t : t + 1], own)[0],
      rtol=0,
      atol=1e-14,
    )
  nothing = PrefixContext(np.zeros((N, V)), np.full(N, -np.inf))
  np.testing.assert_allclose(ntk(nothing), ntk(), rtol=0, atol=1e-14)


def test_output_is_attention_of_one_head(case):
  key, value, _, _ = case
  sequence = queries(L, seed=5)
  pairs = [y[0] for y in context()]
  heads = [y[:, None] for y in (sequence, *pairs, key, value)]
  options = {"prefix_bias": BIAS, "count_normalized": True}
  want = prefix_attention(*heads, scale=1.0, **options)[:, 0]
  got = prefix_output(key, value, sequence, tuple(pairs), **options)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)


def test_order_and_copies_of_entries_do_not_matter(case):
  key, value, (x, pairs), _ = case
  order = np.random.default_rng(0).permutation(M)
  for fn in (
    prefix_output,
    lambda k, v, x, c, **o: prefix_ntk(k, v, x, None, c, **o),
  ):
    np.testing.assert_allclose(
      fn(key[order], value[order], x, pairs),
      fn(key, value, x, pairs),
      rtol=0,
      atol=1e-12,
    )
    twice = np.tile(key, (2, 1)), np.tile(value, (2, 1))
    for own, count in ((pairs, True), (None, True), (None, False)):
      np.testing.assert_allclose(
        fn(*twice, x, own, count_normalized=count),
        fn(key, value, x, own, count_normalized=count),
        rtol=0,
        atol=1e-12,
      )
    # Without normalization copies do count, where there is a context.
    gap = fn(*twice, x, pairs, count_normalized=False) - fn(
      key, value, x, pairs, count_normalized=False
    )
    assert np.abs(gap).max() > 1e-4


def test_a_bias_far_below_leaves_the_context(case):
  key, value, (x, pairs), _ = case
  far = {"prefix_bias": -30.0}
  assert np.abs(prefix_ntk(key, value, x, None, pairs, **far)).max() < 1e-6
  weights = jax.nn.softmax(np.einsum("nd,nld->nl", x, pairs[0]))
  plain = np.einsum("nl,nlv->nv", weights, pairs[1])
  out = prefix_output(key, value, x, pairs, **far)
  np.testing.assert_allclose(out, plain, rtol=0, atol=1e-6)


def test_without_normalization_the_context_is_forgotten():
  x, pairs = queries(), context()
  lengths = [64, 256, 1024, 4096]
  effects = []
  for m in lengths:
    key, value = prefix(m, key_std=0.6)
    ntk = functools.partial(
      prefix_ntk, key, value, x, None, count_normalized=False
    )
    alone = ntk()
    effects.append(np.linalg.norm(ntk(pairs) - alone) / np.linalg.norm(alone))
    # What all values of the context being 1, and of the prefix 0, comes to.
    ones = pairs[0], np.ones_like(pairs[1])
    weight = prefix_output(key, 0 * value, x, ones, count_normalized=False)
    gaps = np.einsum("nld,nd->nl", pairs[0], x).max(1) - (x @ key.T).min(1)
    assert (weight[:, 0] < L / m * np.exp(gaps)).all()
  assert -1.15 < fit_slope(lengths, effects).slope < -0.85


def test_dtypes(case):
  key, value, (x, pairs), _ = case
  low = [jnp.float32(y) for y in (key, value, x)]
  pairs = tuple(jnp.float32(y) for y in pairs)
  want = prefix_ntk(*case[:3][:2], x, None, case[2][1])
  got = prefix_ntk(*low, None, pairs)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
  # Dtypes that differ are promoted, and 16 bits are summed in 32.
  assert prefix_ntk(*low[:2], x, None, pairs).dtype == jnp.float64
  half = [y.astype(jnp.bfloat16) for y in low]
  for fn in (prefix_output, prefix_ntk):
    wide = fn(*(y.astype(jnp.float32) for y in half))
    got = fn(*half)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, wide.astype(jnp.bfloat16))


def test_large_logits_and_gradients_are_finite(case):
  key, value, (x, _), _ = case
  some = PrefixContext(np.ones((N, V)), np.array([-np.inf, 0, 300, -300.0]))

  def total(key):
    return prefix_output(key, value, 100 * x, some, prefix_bias=BIAS).sum()

  assert np.isfinite(jax.grad(total)(key)).all()
  assert np.isfinite(prefix_ntk(key, value, 100 * x, None, some)).all()


def test_works_under_vmap_and_compiles_once(case):
  key, value, (x, pairs), _ = case
  many = np.stack((key, 2 * key))
  ntk = jax.vmap(lambda k: prefix_ntk(k, value, x, None, pairs))
  np.testing.assert_allclose(
    ntk(many)[1],
    prefix_ntk(2 * key, value, x, None, pairs),
    rtol=0,
    atol=1e-13,
  )
  prefix_output(key, value, x, pairs)
  with no_recompilation():
    prefix_ntk(3 * key, value, x, None, pairs, prefix_bias=1.0)
    prefix_output(3 * key, value, x, pairs, prefix_bias=1.0)


_PAIRS = context()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"prefix_key": np.ones(3)}, "prefix_key must have 2 dimensions, got"),
    ({"prefix_key": np.ones((0, D))}, "prefix_key must not be empty"),
    (
      {"prefix_value": np.ones((M + 1, V))},
      "prefix_value must have shape (50, *) = (m, v), got (51, 2)",
    ),
    (
      {"prefix_value": np.ones((M, V), int)},
      "prefix_value must have a floating dtype, got int64",
    ),
    ({"x1": np.ones((N, D + 1))}, "x1 must have shape (*, 3) = (n, d)"),
    ({"x1": np.ones((0, D))}, "x1 must not be empty, got shape (0, 3)"),
    (
      {"context1": (np.ones((7, D)), np.ones((6, V)))},
      "prefix_ntk: context key length 7 != context value length 6",
    ),
    (
      {"context1": (_PAIRS[0], _PAIRS[1][0])},
      "context1 key and value must both be of one datum each or both of all",
    ),
    (
      {"context1": (_PAIRS[0][1:], _PAIRS[1][1:])},
      "context1 key must have shape (4, *, 3) = (n, L, d), got (3, 5, 3)",
    ),
    (
      {"context1": (_PAIRS[0][0], np.ones((L, V + 1)))},
      "context1 must have values of size 2, as the prefix has, got 3",
    ),
    (
      {"context1": (np.ones((0, D)), np.ones((0, V)))},
      "context1 key must not be empty, got shape (0, 3)",
    ),
    (
      {"context1": np.ones((N, V))},
      "context1 must be a pair (key, value) or a PrefixContext, got ndarray",
    ),
    (
      {"context1": PrefixContext(np.ones((N, V)), np.ones(N + 1))},
      "context1.log_mass must have shape (4,) = (n,), got (5,)",
    ),
    (
      {"context1": PrefixContext(np.ones((N, V)), np.ones(N, int))},
      "context1.log_mass must have a floating dtype, got int64",
    ),
    ({"context2": _PAIRS}, "context2 must be None if x2 is, got a context"),
    (
      {"x2": queries(), "context1": _PAIRS},
      "context1 and context2 must both be given or both be None, got context1",
    ),
    ({"prefix_bias": np.inf}, "prefix_bias must be in (-inf, inf), got inf"),
    ({"prefix_bias": np.nan}, "prefix_bias must be in (-inf, inf), got nan"),
    ({"prefix_bias": np.ones(2)}, "prefix_bias must be a real scalar, got"),
    ({"count_normalized": 1}, "count_normalized must be one of False, True"),
    ({"train": ("bias",)}, "train must be one of ('key', 'value'), ('key',)"),
    ({"train": "key"}, "train must be one of ('key', 'value'), ('key',)"),
    ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
  ],
)
def test_refused(change, message):
  key, value = prefix()
  call = {"prefix_key": key, "prefix_value": value, "x1": queries()} | change
  with pytest.raises(ValueError, match=re.escape(message)):
    prefix_ntk(**call)
