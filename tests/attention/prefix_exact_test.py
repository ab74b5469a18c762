"""Exact attention to a prefix."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.attention import (
  prefix_attention,
  softmax_attention,
)
from jaxattn.softmax import prefix_init
from tests._dense import dense_attention
from tests.attention._prefix import (
  dense_formula,
  normal,
  prefix_call,
)


def test_prefix_attention_is_attention_to_the_concatenation():
  query, key, value, *prefix = call = prefix_call(2.0, n=4, kv=2, m=70, s=20)
  mask = np.random.default_rng(0).random((4, 32, 20)) < 0.5
  mask[:, 7] = False
  got = prefix_attention(*call, mask=mask, scale=0.9)
  want = dense_formula(*call, seen=mask, scale=0.9)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
  batch = [np.stack((x, -x)) for x in (query, key, value)]
  got = prefix_attention(*batch, *prefix)
  for i, out in enumerate(got):
    want = dense_formula(*(x[i] for x in batch), *prefix)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-13)


def test_prefix_bias_and_length():
  query, key, value, *prefix = call = prefix_call(m=70)
  bias = np.where(np.arange(70 + 32) < 70, 0.7 - math.log(70), 0.0)
  want = dense_formula(*call, bias=np.broadcast_to(bias, (1, 32, 102)))
  got = prefix_attention(*call, prefix_bias=0.7, count_normalized=True)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
  # Twice the same prefix weighs as much, once it is counted.
  twice = [np.concatenate((x, x)) for x in prefix]
  counted = functools.partial(prefix_attention, count_normalized=True)
  np.testing.assert_allclose(
    counted(query, key, value, *twice), counted(*call), rtol=0, atol=1e-13
  )
  # And a bias far below leaves the context alone.
  np.testing.assert_allclose(
    prefix_attention(*call, prefix_bias=-40.0),
    softmax_attention(query, key, value),
    rtol=0,
    atol=1e-12,
  )


def test_prefix_attention_is_that_of_jax_with_a_bias_row():
  call = prefix_call(2.0, n=4, kv=2, m=70, s=32)
  seen = np.random.default_rng(0).random((4, 32, 32)) < 0.7
  # A query that sees no context sees the prefix.
  seen[:, 3] = False
  options = {"prefix_bias": 0.7, "count_normalized": True}
  bias = np.where(np.arange(70 + 32) < 70, 0.7 - math.log(70), 0.0)
  bias = np.broadcast_to(bias, (1, 4, 32, 102))
  for dtype, atol in (("float32", 1e-5), ("bfloat16", 2e-2)):
    query, key, value, *prefix = (jnp.asarray(x, dtype) for x in call)
    both = [jnp.concatenate(p) for p in zip(prefix, (key, value))]
    for is_causal in (False, True):
      got = prefix_attention(
        query, key, value, *prefix, mask=seen, is_causal=is_causal, **options
      )
      own = seen & np.tri(32, dtype=bool) if is_causal else seen
      want = jax.nn.dot_product_attention(
        query[None],
        *(x[None] for x in both),
        jnp.asarray(bias, dtype),
        jnp.concatenate((jnp.ones((4, 32, 70), bool), own), -1)[None],
      )[0]
      assert got.dtype == dtype
      np.testing.assert_allclose(
        got.astype("float32"), want.astype("float32"), rtol=0, atol=atol
      )


def test_gradients_of_a_prefix():
  call = [x[:, :1] for x in prefix_call(1.0, t=6, s=5, m=9, n=2, kv=2)]

  def grads(fn):
    def loss(call, bias):
      return (fn(*call, bias) * weights).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(tuple(call), 0.3)

  weights = normal(call[0].shape)[0]
  got = grads(lambda *x: prefix_attention(*x[:-1], prefix_bias=x[-1]))

  def dense(*args):
    *call, bias = args
    on_prefix = np.arange(14)[None, None] < 9
    bias = jnp.where(jnp.broadcast_to(on_prefix, (1, 6, 14)), bias, 0)
    key, value = (
      jnp.concatenate((p, x)) for p, x in zip(call[3:], call[1:3], strict=True)
    )
    return dense_attention(call[0], key, value, bias)[0]

  want = grads(dense)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-12)


def test_a_drawn_prefix_unpacks():
  query, key, value, *_ = prefix_call(n=4, kv=2)
  prefix = prefix_init(jax.random.key(0), 20, 2, 8, dtype="float32")
  args = [jnp.float32(x) for x in (query, key, value)]
  out = prefix_attention(*args, *prefix)
  np.testing.assert_allclose(
    out, dense_formula(query, key, value, *prefix), rtol=1e-5, atol=1e-6
  )
  # Any dtype of a prefix will do, and that of the query comes out.
  low = prefix_attention(*(x.astype("bfloat16") for x in args), *prefix)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype("float32"), out, atol=0.02)
