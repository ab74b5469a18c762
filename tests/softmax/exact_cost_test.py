"""What exact attention skips, holds, runs on and refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import BlockSizes, softmax_attention
from jaxattn.softmax import _call, _tiles
from tests._dense import value_and_vjp
from tests._jaxpr import array_sizes
from tests._recompile import quick_jit
from tests.softmax._exact import (
  SELF,
  compiled,
  exact_attention,
  inputs,
  normal,
  random_mask,
)

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
  clean = inputs((2, t, s, 4, 2, 8))
  last = t if options.get("is_causal") else t + options["local_window_size"][1]
  unseen = slice(last, None)
  poisoned = [clean[0], *(_poison(x, unseen) for x in clean[1:])]
  blocks = None if blocks is None else BlockSizes(*blocks)
  run = compiled(
    functools.partial(exact_attention, block_sizes=blocks, **options)
  )
  got, want = run(*poisoned), run(*clean)
  assert all(np.isfinite(x).all() for x in got)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(g, w)
  assert not got[-1][:, unseen].any()
  assert not got[-2][:, unseen].any()


@pytest.mark.parametrize(("s", "heads"), [(4096, (1, 1)), (5000, (4, 2))])
def test_causal_staircase(s, heads):
  """Long causal calls take steps along the diagonal, not tiles across it."""
  arrays = inputs((1, 4096, s, *heads, 8))
  step = _step_of_staircase(arrays)
  masked = {
    "is_causal": True,
    "bias": normal(1, 1, 1, s),
    "mask": random_mask(1, 1, 4096, 1),
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
  clean = inputs((2, block * num, block * num, 4, 2, 8))
  blocks = BlockSizes(*[block] * 4)
  run = compiled(
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
@pytest.mark.parametrize(
  ("platform", "implementation"),
  [("tpu", "xla"), ("cuda", "xla"), ("cuda", None)],
)
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


def test_pallas_is_refused_where_it_cannot_run():
  args = inputs(SELF, dtype=jnp.float32)
  with pytest.raises(NotImplementedError, match="cannot run here: it needs a"):
    softmax_attention(*args, implementation="pallas")
  args = inputs(SELF, dtype="float64")
  with pytest.raises(NotImplementedError, match="float32 or bfloat16, got f"):
    softmax_attention(*args, implementation="pallas")


@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_a_tpu_takes_the_kernels(implementation):
  def loss(*args):
    out = softmax_attention(
      *args, is_causal=True, implementation=implementation
    )
    return out.sum()

  shapes = [jax.typeof(x) for x in inputs(SELF, dtype="float32")]
  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  # Forward, queries, keys and values; no loop of the XLA path.
  assert text.count("@tpu_custom_call") == 3
  assert "stablehlo.while" not in text


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
