"""Exact attention against dense formulas, ``jax.nn`` and loops over queries."""

import functools
import itertools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxattn.attention import BlockSizes, softmax_attention
from jaxattn.softmax import _call, _tiles
from tests._dense import dense_attention, value_and_vjp, visible
from tests._jaxpr import array_sizes
from tests._recompile import quick_jit

# Blocks that leave a remainder in every length below, forward and backward.
_BLOCKS = BlockSizes(6, 5, 7, 4)
# (B, T, S, N, K, H)
_SELF = (2, 20, 20, 4, 2, 8)
_CROSS = (2, 13, 21, 4, 1, 8)
_NO_GROUPS = (1, 16, 16, 2, 2, 4)


def _inputs(sizes, value_dim=None, dtype=None, seed=0):
  b, t, s, n, k, h = sizes
  rng = np.random.default_rng(seed)
  shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, value_dim or h))
  return [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]


def _normal(*shape, seed=3):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def _random_mask(*shape):
  """True with probability 0.7, and on the diagonal: every query sees a key."""
  mask = np.random.default_rng(4).random(shape) < 0.7
  return jnp.asarray(mask | np.eye(*shape[-2:], dtype=bool))


def _dense(
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


def _exact(*args, block_sizes=_BLOCKS, **options):
  return softmax_attention(
    *args, block_sizes=block_sizes, return_residual=True, **options
  )


def _out(fn):
  """``fn`` without its log-sum-exp."""
  return lambda *args: fn(*args)[0]


def _compiled(fn):
  """Values of ``fn`` and gradients for each of its arguments."""

  def run(*args):
    out, vjp = jax.vjp(fn, *args)
    bars = jax.tree.map(lambda x: _normal(*x.shape).astype(x.dtype), out)
    return jax.tree.leaves((out, vjp(bars)))

  return quick_jit(run)


def _value_and_grads(fn, args):
  return _compiled(fn)(*args)


def _assert_same(got, want, tol=1e-11):
  assert len(got) == len(want)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=tol, atol=tol)


def _check(args, options, block_sizes=_BLOCKS):
  """Output, log-sum-exp and gradients of both against the dense formula."""
  exact = functools.partial(_exact, block_sizes=block_sizes, **options)
  dense = functools.partial(_dense, **options)
  _assert_same(_value_and_grads(exact, args), _value_and_grads(dense, args))


# --- oracles ---

_JAX_NN = {
  "plain": (_SELF, {}),
  "causal_mask": (_SELF, {"is_causal": True, "mask": (2, 1, 20, 20)}),
  "window_bias": (_SELF, {"local_window_size": (5, 2), "bias": (1, 4, 20, 20)}),
  "lengths": (
    _SELF,
    {"query_seq_lengths": (11, 20), "key_value_seq_lengths": (14, 7)},
  ),
  "multi_query": (_CROSS, {"scale": 0.3, "bias": (2, 1, 1, 21)}),
  "multi_query_causal": (_CROSS, {"is_causal": True, "bias": (1, 4, 13, 1)}),
  "multi_query_window": (
    _CROSS,
    {
      "local_window_size": (3, 6),
      "mask": (1, 4, 13, 21),
      "key_value_seq_lengths": (21, 18),
    },
  ),
  "all": (
    _NO_GROUPS,
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
  args = _inputs(sizes)
  if "bias" in options:
    args.append(_normal(*options.pop("bias")))
  if "mask" in options:
    options["mask"] = _random_mask(*options["mask"])
  for name in ("query_seq_lengths", "key_value_seq_lengths"):
    if name in options:
      options[name] = jnp.array(options[name], jnp.int32)
  exact = functools.partial(_exact, **options)
  peer = functools.partial(
    jax.nn.dot_product_attention, implementation="xla", **options
  )
  # jax.nn's logits are float32 whatever comes in.
  _assert_same(
    _value_and_grads(_out(exact), args), _value_and_grads(peer, args), 5e-6
  )


def test_equals_a_loop_over_queries():
  b, t, s, n, k, _ = _CROSS
  query, key, value = _inputs(_CROSS, value_dim=5)
  bias, mask = _normal(b, n, t, s), np.asarray(_random_mask(b, n, t, s))
  query_lengths, key_lengths, window = [13, 9], [17, 21], (4, 6)
  out, lse = quick_jit(
    functools.partial(
      _exact,
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
  _assert_same([out, lse], [want, want_lse])


@pytest.mark.parametrize(
  "blocks", [(1, 1, 1, 1), (99, 50, 64, 99), (3, 7, 2, 5), (13, 21, 5, 4)]
)
def test_block_sizes_never_change_the_result(blocks):
  args = [*_inputs(_CROSS, value_dim=5), _normal(1, 4, 13, 21)]
  options = {
    "mask": _random_mask(2, 1, 13, 21),
    "local_window_size": (6, 9),
    "key_value_seq_lengths": jnp.array([21, 16]),
  }
  _check(args, options, BlockSizes(*blocks))


@pytest.mark.parametrize("sizes", [(2, 1, 21, 4, 2, 8), (2, 13, 1, 4, 2, 8)])
def test_one_query_or_one_key(sizes):
  _check(_inputs(sizes), {"is_causal": True}, BlockSizes(4, 4, 4, 4))


def test_default_blocks_and_unbatched():
  # More than one default block of queries and of keys, with a remainder.
  args = [x[0] for x in _inputs((1, 2100, 1100, 2, 1, 4))]
  exact = functools.partial(
    softmax_attention,
    is_causal=True,
    return_residual=True,
    query_seq_lengths=jnp.array([2050]),
  )

  def dense(*args):
    out, lse = _dense(
      *(x[None] for x in args),
      is_causal=True,
      query_seq_lengths=jnp.array([2050]),
    )
    return out[0], lse[0]

  _assert_same(_value_and_grads(exact, args), _value_and_grads(dense, args))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_branch_of_other_platforms(monkeypatch, dtype):
  # On a CPU the branch for accelerators is compiled away: run it in its place.
  def other_branch(*operands, default, **_):
    return default(*operands)

  monkeypatch.setattr(jax.lax, "platform_dependent", other_branch)
  args = [*_inputs(_SELF, dtype=dtype), _normal(1, 4, 20, 20).astype(dtype)]
  options = {"is_causal": True, "mask": _random_mask(2, 1, 20, 20)}
  got = _value_and_grads(functools.partial(_exact, **options), args)
  wide = [x.astype("float64") for x in args]
  want = _value_and_grads(functools.partial(_dense, **options), wide)
  assert [x.dtype for x in got[2:]] == [x.dtype for x in args]
  for g, w in zip(got, want, strict=True):
    error = np.abs(np.asarray(g, "float64") - w).max() / np.abs(w).max()
    assert error < 4 * float(jnp.finfo(dtype).eps)


# --- what is skipped ---


def _poison(x, positions):
  return x.at[:, positions].set(jnp.nan)


@pytest.mark.parametrize(
  ("t", "s", "options", "blocks"),
  [
    (8, 24, {"is_causal": True}, (4, 4, 4, 4)),
    # A visited block that sticks out of the band holds NaN, too.
    (7, 23, {"is_causal": True}, (3, 5, 4, 6)),
    (9, 23, {"local_window_size": (1, 5)}, (2, 4, 4, 5)),
    (64, 2048, {"is_causal": True}, None),
  ],
)
def test_keys_that_no_query_sees_may_be_nan(t, s, options, blocks):
  clean = _inputs((2, t, s, 4, 2, 8))
  last = t if options.get("is_causal") else t + options["local_window_size"][1]
  unseen = slice(last, None)
  poisoned = [clean[0], *(_poison(x, unseen) for x in clean[1:])]
  blocks = None if blocks is None else BlockSizes(*blocks)
  run = _compiled(functools.partial(_exact, block_sizes=blocks, **options))
  got, want = run(*poisoned), run(*clean)
  assert all(np.isfinite(x).all() for x in got)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(g, w)
  assert not got[-1][:, unseen].any()
  assert not got[-2][:, unseen].any()


@pytest.mark.parametrize(("s", "heads"), [(4096, (1, 1)), (5000, (4, 2))])
def test_causal_staircase(s, heads):
  """Long causal calls take steps along the diagonal, not tiles across it."""
  arrays = _inputs((1, 4096, s, *heads, 8))
  step = _step_of_staircase(arrays)
  masked = {
    "is_causal": True,
    "bias": _normal(1, 1, 1, s),
    "mask": _random_mask(1, 1, 4096, 1),
    "key_value_seq_lengths": jnp.array([3000]),
  }
  tiles = BlockSizes(512, 512, 512, 512)
  for options in ({"is_causal": True}, masked):
    attend = jax.jit(functools.partial(softmax_attention, **options))
    got = attend(*arrays)
    want = softmax_attention(*arrays, block_sizes=tiles, **options)
    np.testing.assert_allclose(got, want, atol=1e-14)
    # Queries of earlier steps never touch what comes after them.
    first = 5 * step
    query, *rest = arrays
    got_late = attend(query, *(_poison(x, slice(first, None)) for x in rest))
    np.testing.assert_array_equal(got_late[:, :first], got[:, :first])


def _step_of_staircase(arrays):
  query, key, value = arrays
  b, t, _, h = query.shape
  operands = _call.Operands(
    query.reshape(b, t, key.shape[2], -1, h), key, value
  )
  spec = _call.Spec(1.0, _tiles.Band(after=0), None, None)
  plan = _call.plan(operands, spec, cpu=True, backward=False)
  assert plan.queries.block == 8 * plan.diagonal.block < t
  return plan.diagonal.block


_BANDS = [
  ({"is_causal": True}, lambda gap: gap <= 0),
  ({"local_window_size": (5, 3)}, lambda gap: (gap >= -5) & (gap <= 3)),
  (
    {"local_window_size": 2, "is_causal": True},
    lambda gap: (gap >= -2) & (gap <= 0),
  ),
]


@pytest.mark.parametrize(("options", "band"), _BANDS)
def test_tiles_outside_the_band_are_never_read(options, band):
  """NaN in one block spreads to the tiles that the band visits, no further."""
  block, num = 4, 6
  clean = _inputs((2, block * num, block * num, 4, 2, 8))
  blocks = BlockSizes(*[block] * 4)
  run = _compiled(
    functools.partial(softmax_attention, block_sizes=blocks, **options)
  )
  want = run(*clean)
  rows = np.arange(block * num)
  seen = band(rows[None] - rows[:, None])
  seen = seen.reshape(num, block, num, block).any((1, 3))
  assert not seen.all()
  for j in range(num):
    at = slice(block * j, block * (j + 1))
    query, key, value = clean
    got = run(query, _poison(key, at), _poison(value, at))
    # These queries are spoiled, and so is what they send back to their keys.
    hit = seen[:, j]
    back = seen[hit].any(0)
    for g, w, spoiled in zip(got, want, (hit, hit, back, back), strict=True):
      _assert_hit(g, w, spoiled, block)
    got = run(_poison(query, at), key, value)
    own = np.arange(num) == j
    hit = (own, own, seen[j], seen[j])
    for g, w, spoiled in zip(got, want, hit, strict=True):
      _assert_hit(g, w, spoiled, block)


def _assert_hit(got, want, hit, block):
  """Blocks that are not hit equal ``want``; the others are NaN somewhere."""
  for i, spoiled in enumerate(hit):
    part = slice(block * i, block * (i + 1))
    if spoiled:
      assert np.isnan(got[:, part]).any()
    else:
      np.testing.assert_array_equal(got[:, part], want[:, part])


# --- log-sum-exp, scale, bias ---


def test_log_sum_exp_and_its_gradient():
  query, key, value = _inputs(_SELF)
  mask = _random_mask(2, 4, 20, 20).at[:, :, 3].set(False)

  def lse(*args):
    return _exact(*args, mask=mask)[1]

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

  got = _value_and_grads(lse, (query, key, value))
  want = _value_and_grads(direct, (query, key, value))
  _assert_same(got[:3], want[:3])
  assert np.isneginf(got[0][:, 3]).all()
  assert not got[3].any()


def test_log_sum_exp_of_16_bit_inputs_is_float32():
  args = _inputs(_NO_GROUPS, dtype="bfloat16")
  shapes = jax.eval_shape(_exact, *args)
  assert [x.dtype for x in shapes] == [jnp.bfloat16, jnp.float32]


def test_scale_may_be_traced_and_has_a_gradient():
  args = (*_inputs(_SELF), jnp.asarray(0.37))

  def with_scale(fn):
    return lambda query, key, value, scale: fn(query, key, value, scale=scale)

  got = _value_and_grads(with_scale(_exact), args)
  _assert_same(got, _value_and_grads(with_scale(_dense), args))
  static = quick_jit(functools.partial(_exact, scale=0.37))(*args[:3])
  _assert_same(got[:2], static)


@functools.cache
def _with_bias():
  exact = functools.partial(_exact, block_sizes=BlockSizes(4, 4, 4, 4))

  def run(bars, mask, *args):
    return value_and_vjp(functools.partial(exact, mask=mask), bars, *args)

  return quick_jit(run)


# Every choice of full axes for any three of (B, N, T, S).
_FULL = [x for x in itertools.product([0, 1], repeat=4) if sum(x) % 2 == 0]


@pytest.mark.parametrize("full", _FULL)
def test_bias_and_mask_that_broadcast(full):
  sizes = (2, 4, 8, 12)
  args = _inputs((2, 8, 12, 4, 2, 4))
  bars = (_normal(2, 8, 4, 4), _normal(2, 8, 4))
  bias = _normal(*(n if f else 1 for f, n in zip(full, sizes)))
  # The mask has the other half of the shapes.
  other = (1 - full[0], *full[1:])
  shape = [n if f else 1 for f, n in zip(other, sizes)]
  mask = jnp.asarray(np.random.default_rng(6).random(shape) < 0.8)
  (out, lse), grads = _with_bias()(bars, mask, *args, bias)

  mask, bias = (jnp.broadcast_to(x, sizes) for x in (mask, bias))
  (want, want_lse), want_grads = _with_bias()(bars, mask, *args, bias)
  summed = tuple(axis for axis in range(4) if not full[axis])
  bias_bar = want_grads[3].sum(summed, keepdims=True)
  _assert_same([out, lse, *grads], [want, want_lse, *want_grads[:3], bias_bar])


def test_infinite_bias_hides_a_key():
  args = _inputs(_SELF)
  mask = _random_mask(1, 4, 20, 20).at[:, :, 7].set(False)
  bias = jnp.where(mask, 0.0, -jnp.inf)
  got = _value_and_grads(lambda *x: _exact(*x, bias), args)
  _assert_same(got, _value_and_grads(lambda *x: _exact(*x, mask=mask), args))


# --- derivatives ---


def test_second_derivatives():
  args = [*_inputs((1, 9, 11, 2, 1, 4)), _normal(1, 2, 9, 1)]
  mask = _random_mask(1, 1, 9, 11).at[:, :, 4].set(False)

  def gradients(fn):
    def loss(*args):
      out, lse = fn(*args, mask=mask, is_causal=True)
      return jnp.sin(out).sum() + jnp.sin(jnp.where(lse > -1e9, lse, 0)).sum()

    return jax.grad(loss, range(4))

  got = _value_and_grads(gradients(_exact), args)
  _assert_same(got, _value_and_grads(gradients(_dense), args), 1e-10)


def test_forward_mode_is_refused():
  args = tuple(_inputs(_NO_GROUPS))
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jit(lambda *x: jax.jvp(softmax_attention, x, x)).lower(*args)


# --- memory ---


def _forward(*args):
  return softmax_attention(*args, is_causal=True)


def _backward(*args):
  return value_and_vjp(_forward, jnp.ones_like(args[0]), *args)[1]


@pytest.mark.any_x64
@pytest.mark.parametrize("fn", [_forward, _backward])
def test_memory_is_linear_in_length(fn):
  def temporary(t):
    shapes = [jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)] * 3
    analysis = quick_jit(fn).lower(*shapes).compile().memory_analysis()
    return analysis.temp_size_in_bytes

  short, long = temporary(4096), temporary(16384)
  assert short > 0
  assert long < 4.2 * short
  assert long < 2 * 16384**2 * 4 / 50  # of all logits of the two heads


@pytest.mark.any_x64
@pytest.mark.parametrize("fn", [_forward, _backward])
def test_no_array_of_all_logits(fn):
  t = 8192
  shapes = [jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)] * 3
  sizes = array_sizes(fn, *shapes)
  # A tile is there, and nothing near (T, S): the walk saw the inner loops.
  assert 2**18 <= max(sizes) <= t * t / 16


# --- platforms and refusals ---


@pytest.mark.any_x64
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_lowers_for_other_platforms(platform, implementation):
  def run(query, key, value, bias):
    fn = functools.partial(
      softmax_attention, is_causal=True, implementation=implementation
    )
    return value_and_vjp(fn, query, query, key, value, bias)

  shapes = [jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16)] * 3
  bias = jax.ShapeDtypeStruct((1, 4, 1024, 1024), jnp.bfloat16)
  lowered = (
    jax.jit(run).trace(*shapes, bias).lower(lowering_platforms=(platform,))
  )
  text = lowered.as_text()
  # Accelerators multiply in bfloat16 and add in float32; CPUs widen first.
  assert re.search(r"dot_general.*bf16>.*bf16>\) -> tensor<[0-9x]*f32>", text)


@pytest.mark.any_x64
def test_cudnn_on_a_cpu_says_why_not():
  args = [jnp.ones((1, 8, 2, 4), jnp.bfloat16)] * 3
  with pytest.raises(
    NotImplementedError,
    match=r"implementation='cudnn' cannot run here: it needs a CUDA device",
  ):
    softmax_attention(*args, implementation="cudnn")


@pytest.mark.any_x64
@pytest.mark.parametrize(
  ("option", "bad", "message"),
  [
    ("bias", np.ones((2, 2, 3, 3), int), "bias must have a floating dtype"),
    ("bias", np.ones((2, 3), "f"), "bias must be broadcastable to (B, N, T, "),
    ("bias", np.ones((2, 2, 3, 2), "f"), "= (2, 2, 3, 3), got "),
    ("query_seq_lengths", np.ones(2, "f"), "lengths must be integers, got "),
    ("query_seq_lengths", np.ones(3, int), "must have shape (2,) = (B,), got"),
    ("query_seq_lengths", np.array([1, -1]), "must be non-negative, got [ 1"),
    ("key_value_seq_lengths", np.ones(2, "f"), "must be integers, got dtype"),
    ("key_value_seq_lengths", np.ones((2, 1), int), "must have shape (2,)"),
    ("key_value_seq_lengths", np.array([-1, 1]), "must be non-negative, got"),
    ("local_window_size", -1, "local_window_size must be >= 0, got -1"),
    ("local_window_size", (2, -1), "local_window_size must be >= 0, got -1"),
    ("local_window_size", 1.5, "local_window_size must be an integer >= 0"),
    ("local_window_size", (1, 2, 3), "or a pair (left, right), got (1, 2, 3)"),
    ("block_sizes", (8, 8, 8, 8), "block_sizes must be a BlockSizes, got (8,"),
  ],
)
def test_refused_options(option, bad, message):
  args = [jnp.ones((2, 3, 2, 4))] * 3
  with pytest.raises(ValueError, match=re.escape(message)):
    softmax_attention(*args, **{option: bad})


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
    return jax.tree.leaves(value_and_vjp(_out(attend), bar, *args))

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
  args = _inputs(_SELF, seed=seed)
  mask = np.random.default_rng(seed).random((2, 4, 20, 20)) < density
  lengths = map(jnp.array, (query_lengths, key_lengths))
  arrays = (args[0], args, mask, *lengths)
  exact = _random_case(_exact, local_window_size=window, is_causal=is_causal)
  got = exact(*arrays)
  band = visible(20, 20, window=window, is_causal=is_causal)
  want = _random_case(_dense)(*arrays[:2], mask & band, *arrays[3:])
  _assert_same(got, want)
