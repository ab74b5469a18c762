"""Inputs and oracle of the tests of exact attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.attention import BlockSizes, softmax_attention
from tests._dense import dense_attention, visible
from tests._recompile import quick_jit

# Blocks that leave a remainder in every length below, forward and backward.
BLOCKS = BlockSizes(6, 5, 7, 4)
# (B, T, S, N, K, H)
SELF = (2, 20, 20, 4, 2, 8)
CROSS = (2, 13, 21, 4, 1, 8)
NO_GROUPS = (1, 16, 16, 2, 2, 4)


def inputs(sizes, value_dim=None, dtype=None, seed=0):
  b, t, s, n, k, h = sizes
  rng = np.random.default_rng(seed)
  shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, value_dim or h))
  return [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]


def normal(*shape, seed=3):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def random_mask(*shape):
  """True with probability 0.7, and on the diagonal: every query sees a key."""
  mask = np.random.default_rng(4).random(shape) < 0.7
  return jnp.asarray(mask | np.eye(*shape[-2:], dtype=bool))


def dense_formula(
  query,
  key,
  value,
  bias=None,
  mask=None,
  *,
  scale=None,
  is_causal=False,
  query_seq_lengths=None,
  key_value_seq_lengths=None,
  local_window_size=None,
):
  """The same arguments, all logits at once: output and log-sum-exp."""
  t, s = query.shape[1], key.shape[1]
  window = local_window_size
  window = (window, window) if isinstance(window, int) else window
  seen = jnp.asarray(visible(t, s, is_causal=is_causal, window=window))[None]
  if query_seq_lengths is not None:
    seen &= (jnp.arange(t)[None] < query_seq_lengths[:, None])[:, :, None]
  if key_value_seq_lengths is not None:
    seen &= (jnp.arange(s)[None] < key_value_seq_lengths[:, None])[:, None]
  seen = seen[:, None] if mask is None else seen[:, None] & mask
  return dense_attention(query, key, value, bias, seen=seen, scale=scale)


def exact_attention(*args, block_sizes=BLOCKS, **options):
  return softmax_attention(
    *args, block_sizes=block_sizes, return_residual=True, **options
  )


def without_sums(fn):
  """``fn`` without its log-sum-exp."""
  return lambda *args: fn(*args)[0]


def compiled(fn):
  """Values of ``fn`` and gradients for each of its arguments."""

  def run(*args):
    out, vjp = jax.vjp(fn, *args)
    bars = jax.tree.map(lambda x: normal(*x.shape).astype(x.dtype), out)
    return jax.tree.leaves((out, vjp(bars)))

  return quick_jit(run)


def value_and_grads(fn, args):
  return compiled(fn)(*args)


def assert_same(got, want, tol=1e-11):
  assert len(got) == len(want)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=tol, atol=tol)


def check(args, options, block_sizes=BLOCKS):
  """Output, log-sum-exp and gradients of both against the dense formula."""
  exact = functools.partial(exact_attention, block_sizes=block_sizes, **options)
  dense = functools.partial(dense_formula, **options)
  assert_same(value_and_grads(exact, args), value_and_grads(dense, args))
