"""Exact attention against dense formulas, ``jax.nn`` and loops over queries."""

import functools
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxattn.attention import BlockSizes, softmax_attention
from tests._dense import value_and_vjp, visible
from tests._recompile import quick_jit
from tests.softmax._exact import (
  CROSS,
  NO_GROUPS,
  SELF,
  assert_same,
  check,
  dense_formula,
  exact_attention,
  inputs,
  normal,
  random_mask,
  value_and_grads,
  without_sums,
)

# --- oracles ---

_JAX_NN = {
  "plain": (SELF, {}),
  "causal_mask": (SELF, {"is_causal": True, "mask": (2, 1, 20, 20)}),
  "window_bias": (SELF, {"local_window_size": (5, 2), "bias": (1, 4, 20, 20)}),
  "lengths": (
    SELF,
    {"query_seq_lengths": (11, 20), "key_value_seq_lengths": (14, 7)},
  ),
  "multi_query": (CROSS, {"scale": 0.3, "bias": (2, 1, 1, 21)}),
  "multi_query_causal": (CROSS, {"is_causal": True, "bias": (1, 4, 13, 1)}),
  "multi_query_window": (
    CROSS,
    {
      "local_window_size": (3, 6),
      "mask": (1, 4, 13, 21),
      "key_value_seq_lengths": (21, 18),
    },
  ),
  "all": (
    NO_GROUPS,
    {
      "is_causal": True,
      "local_window_size": (9, 0),
      "mask": (1, 2, 16, 16),
      "bias": (1, 1, 16, 16),
      "query_seq_lengths": (12,),
      "key_value_seq_lengths": (14,),
      "scale": -0.7,
    },
  ),
}


@pytest.mark.parametrize("case", _JAX_NN)
def test_equals_jax_nn(case):
  sizes, options = _JAX_NN[case]
  options = dict(options)
  args = inputs(sizes)
  if "bias" in options:
    args.append(normal(*options.pop("bias")))
  if "mask" in options:
    options["mask"] = random_mask(*options["mask"])
  for name in ("query_seq_lengths", "key_value_seq_lengths"):
    if name in options:
      options[name] = jnp.array(options[name], jnp.int32)
  exact = functools.partial(exact_attention, **options)
  peer = functools.partial(
    jax.nn.dot_product_attention, implementation="xla", **options
  )
  # jax.nn's logits are float32 whatever comes in.
  assert_same(
    value_and_grads(without_sums(exact), args),
    value_and_grads(peer, args),
    5e-6,
  )


def test_equals_a_loop_over_queries():
  b, t, s, n, k, _ = CROSS
  query, key, value = inputs(CROSS, value_dim=5)
  bias, mask = normal(b, n, t, s), np.asarray(random_mask(b, n, t, s))
  query_lengths, key_lengths, window = [13, 9], [17, 21], (4, 6)
  out, lse = quick_jit(
    functools.partial(
      exact_attention,
      scale=0.4,
      query_seq_lengths=jnp.array(query_lengths),
      key_value_seq_lengths=jnp.array(key_lengths),
      local_window_size=window,
    )
  )(query, key, value, bias, mask)
  want, want_lse = np.zeros((b, t, n, 5)), np.full((b, t, n), -np.inf)
  q, k_, v, bias = (np.asarray(x) for x in (query, key, value, bias))
  for i, row, head in itertools.product(range(b), range(t), range(n)):
    if row >= query_lengths[i]:
      continue
    keys = [
      j
      for j in range(key_lengths[i])
      if row - window[0] <= j <= row + window[1] and mask[i, head, row, j]
    ]
    shared = head * k // n
    logits = [
      0.4 * sum(x * y for x, y in zip(q[i, row, head], k_[i, j, shared]))
      + bias[i, head, row, j]
      for j in keys
    ]
    total = math.fsum(map(math.exp, logits))
    for j, logit in zip(keys, logits):
      want[i, row, head] += math.exp(logit) / total * v[i, j, shared]
    want_lse[i, row, head] = math.log(total)
  assert_same([out, lse], [want, want_lse])


@pytest.mark.parametrize(
  "blocks", [(1, 1, 1, 1), (99, 50, 64, 99), (3, 7, 2, 5), (13, 21, 5, 4)]
)
def test_block_sizes_never_change_the_result(blocks):
  args = [*inputs(CROSS, value_dim=5), normal(1, 4, 13, 21)]
  options = {
    "mask": random_mask(2, 1, 13, 21),
    "local_window_size": (6, 9),
    "key_value_seq_lengths": jnp.array([21, 16]),
  }
  check(args, options, BlockSizes(*blocks))


@pytest.mark.parametrize("sizes", [(2, 1, 21, 4, 2, 8), (2, 13, 1, 4, 2, 8)])
def test_one_query_or_one_key(sizes):
  check(inputs(sizes), {"is_causal": True}, BlockSizes(4, 4, 4, 4))


def test_default_blocks_and_unbatched():
  # More than one default block of queries and of keys, with a remainder.
  args = [x[0] for x in inputs((1, 2100, 1100, 2, 1, 4))]
  exact = functools.partial(
    softmax_attention,
    is_causal=True,
    return_residual=True,
    query_seq_lengths=jnp.array([2050]),
  )

  def dense(*args):
    out, lse = dense_formula(
      *(x[None] for x in args),
      is_causal=True,
      query_seq_lengths=jnp.array([2050]),
    )
    return out[0], lse[0]

  assert_same(value_and_grads(exact, args), value_and_grads(dense, args))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_branch_of_other_platforms(monkeypatch, dtype):
  # On a CPU the branch for accelerators is compiled away: run it in its place.
  def other_branch(*operands, default, **_):
    return default(*operands)

  monkeypatch.setattr(jax.lax, "platform_dependent", other_branch)
  args = [*inputs(SELF, dtype=dtype), normal(1, 4, 20, 20).astype(dtype)]
  options = {"is_causal": True, "mask": random_mask(2, 1, 20, 20)}
  got = value_and_grads(functools.partial(exact_attention, **options), args)
  wide = [x.astype("float64") for x in args]
  want = value_and_grads(functools.partial(dense_formula, **options), wide)
  assert [x.dtype for x in got[2:]] == [x.dtype for x in args]
  for g, w in zip(got, want, strict=True):
    error = np.abs(np.asarray(g, "float64") - w).max() / np.abs(w).max()
    assert error < 4 * float(jnp.finfo(dtype).eps)


# --- log-sum-exp, scale, bias ---


def test_log_sum_exp_and_its_gradient():
  query, key, value = inputs(SELF)
  mask = random_mask(2, 4, 20, 20).at[:, :, 3].set(False)

  def lse(*args):
    return exact_attention(*args, mask=mask)[1]

  def direct(query, key, value):
    del value
    logits = jnp.einsum(
      "btngh,bsnh->btngs", query.reshape(2, 20, 2, 2, 8), key
    ) / math.sqrt(8)
    logits = logits.reshape(2, 20, 4, 20)
    seen = jnp.moveaxis(mask, 1, 2)
    # Row 3 sees nothing: -inf, and no gradient.
    logits = jnp.where(seen.at[:, 3].set(True), logits, -jnp.inf)
    full = jax.nn.logsumexp(logits, -1)
    return jnp.where(seen.any(-1), full, -jnp.inf)

  got = value_and_grads(lse, (query, key, value))
  want = value_and_grads(direct, (query, key, value))
  assert_same(got[:3], want[:3])
  assert np.isneginf(got[0][:, 3]).all()
  assert not got[3].any()


def test_log_sum_exp_of_16_bit_inputs_is_float32():
  args = inputs(NO_GROUPS, dtype="bfloat16")
  shapes = jax.eval_shape(exact_attention, *args)
  assert [x.dtype for x in shapes] == [jnp.bfloat16, jnp.float32]


def test_scale_may_be_traced_and_has_a_gradient():
  args = (*inputs(SELF), jnp.asarray(0.37))

  def with_scale(fn):
    return lambda query, key, value, scale: fn(query, key, value, scale=scale)

  got = value_and_grads(with_scale(exact_attention), args)
  assert_same(got, value_and_grads(with_scale(dense_formula), args))
  static = quick_jit(functools.partial(exact_attention, scale=0.37))(*args[:3])
  assert_same(got[:2], static)


@functools.cache
def _with_bias():
  exact = functools.partial(exact_attention, block_sizes=BlockSizes(4, 4, 4, 4))

  def run(bars, mask, *args):
    return value_and_vjp(functools.partial(exact, mask=mask), bars, *args)

  return quick_jit(run)


# Every choice of full axes for any three of (B, N, T, S).
_FULL = [x for x in itertools.product([0, 1], repeat=4) if sum(x) % 2 == 0]


@pytest.mark.parametrize("full", _FULL)
def test_bias_and_mask_that_broadcast(full):
  sizes = (2, 4, 8, 12)
  args = inputs((2, 8, 12, 4, 2, 4))
  bars = (normal(2, 8, 4, 4), normal(2, 8, 4))
  bias = normal(*(n if f else 1 for f, n in zip(full, sizes)))
  # The mask has the other half of the shapes.
  other = (1 - full[0], *full[1:])
  shape = [n if f else 1 for f, n in zip(other, sizes)]
  mask = jnp.asarray(np.random.default_rng(6).random(shape) < 0.8)
  (out, lse), grads = _with_bias()(bars, mask, *args, bias)

  mask, bias = (jnp.broadcast_to(x, sizes) for x in (mask, bias))
  (want, want_lse), want_grads = _with_bias()(bars, mask, *args, bias)
  summed = tuple(axis for axis in range(4) if not full[axis])
  bias_bar = want_grads[3].sum(summed, keepdims=True)
  assert_same([out, lse, *grads], [want, want_lse, *want_grads[:3], bias_bar])


def test_infinite_bias_hides_a_key():
  args = inputs(SELF)
  mask = random_mask(1, 4, 20, 20).at[:, :, 7].set(False)
  bias = jnp.where(mask, 0.0, -jnp.inf)
  got = value_and_grads(lambda *x: exact_attention(*x, bias), args)
  assert_same(
    got, value_and_grads(lambda *x: exact_attention(*x, mask=mask), args)
  )


# --- derivatives ---


def test_second_derivatives():
  args = [*inputs((1, 9, 11, 2, 1, 4)), normal(1, 2, 9, 1)]
  mask = random_mask(1, 1, 9, 11).at[:, :, 4].set(False)

  def gradients(fn):
    def loss(*args):
      out, lse = fn(*args, mask=mask, is_causal=True)
      return jnp.sin(out).sum() + jnp.sin(jnp.where(lse > -1e9, lse, 0)).sum()

    return jax.grad(loss, range(4))

  got = value_and_grads(gradients(exact_attention), args)
  assert_same(got, value_and_grads(gradients(dense_formula), args), 1e-10)


def test_forward_mode_is_refused():
  args = tuple(inputs(NO_GROUPS))
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jit(lambda *x: jax.jvp(softmax_attention, x, x)).lower(*args)


# --- random cases ---


@functools.cache
def _random_case(fn, **options):
  """One program for all masks and lengths."""

  def run(bar, args, mask, query_lengths, key_lengths):
    attend = functools.partial(
      fn,
      mask=mask,
      query_seq_lengths=query_lengths,
      key_value_seq_lengths=key_lengths,
      **options,
    )
    return jax.tree.leaves(value_and_vjp(without_sums(attend), bar, *args))

  return quick_jit(run)


@hypothesis.settings(derandomize=True, max_examples=25, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  density=st.floats(0, 1),
  query_lengths=st.tuples(*[st.integers(0, 25)] * 2),
  key_lengths=st.tuples(*[st.integers(0, 25)] * 2),
  window=st.sampled_from([None, (3, 1)]),
  is_causal=st.booleans(),
)
def test_random_masks_windows_and_lengths(
  seed, density, query_lengths, key_lengths, window, is_causal
):
  args = inputs(SELF, seed=seed)
  mask = np.random.default_rng(seed).random((2, 4, 20, 20)) < density
  lengths = map(jnp.array, (query_lengths, key_lengths))
  arrays = (args[0], args, mask, *lengths)
  exact = _random_case(
    exact_attention, local_window_size=window, is_causal=is_causal
  )
  got = exact(*arrays)
  band = visible(20, 20, window=window, is_causal=is_causal)
  want = _random_case(dense_formula)(*arrays[:2], mask & band, *arrays[3:])
  assert_same(got, want)
