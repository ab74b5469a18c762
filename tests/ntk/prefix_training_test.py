"""Training of a prefix: against its tangent kernel, at three scales."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import prefix_attention
from jaxattn.ntk import (
  prefix_limit_kernel,
  prefix_ntk,
  prefix_output,
  train_prefix,
)
from jaxattn.scaling import fit_slope
from tests._recompile import no_recompilation

_N, _DIM, _V, _L, _STEPS = 12, 6, 2, 4, 1500
_LENGTHS = (64, 256, 1024)
_SEEDS = 5


def _data(seed=1):
  """Unit queries with a context each, and targets."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((_N, _DIM))
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  y = rng.standard_normal((_N, _V))
  context = rng.standard_normal((_N, _L, _DIM))
  return x, y, (context, rng.standard_normal((_N, _L, _V)))


def _train(length, output_scale="m", num_steps=_STEPS, **options):
  x, y, context = _data()
  fn = functools.partial(
    train_prefix,
    x=x,
    y=y,
    context=context,
    length=length,
    output_scale=output_scale,
    num_steps=num_steps,
    record=True,
    **options,
  )
  rngs = jax.random.split(jax.random.key(length), _SEEDS)
  return jax.device_get(jax.jit(lambda r: jax.lax.map(fn, r))(rngs))


def _predicted(kernel, rate, y, num_steps):
  """Outputs of descent on a model whose kernel does not change."""
  out, outs = np.zeros_like(y), []
  for _ in range(num_steps + 1):
    outs.append(out)
    out = out + rate * np.einsum("iajb,jb->ia", kernel, y - out)
  return np.stack(outs)


def _relative(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def _measure(length, output_scale="m"):
  """Medians over seeds of what makes a prefix lazy."""
  x, y, context = _data()
  limit = np.asarray(prefix_limit_kernel(x, None, context))
  prefixes, history = _train(length, output_scale)
  rows = []
  for seed in range(_SEEDS):
    initial, last = (
      np.asarray(
        prefix_ntk(p.key[seed, :, 0], p.value[seed, :, 0], x, None, context)
      )
      for p in (history.initial, prefixes)
    )
    scale = length if output_scale == "m" else length**0.5
    rate = history.learning_rate[seed] * scale**2 / length
    row = {"change": _relative(last, initial), "loss": history.loss[seed, -1]}
    for name, kernel in (("own", initial), ("limit", limit)):
      path = _predicted(kernel, rate, y, _STEPS)
      gaps = np.linalg.norm(history.outputs[seed] - path, axis=(1, 2))
      row[name] = gaps.max() / np.linalg.norm(y)
    rows.append(row)
  return {name: np.median([r[name] for r in rows]) for name in rows[0]}


def test_long_prefixes_are_lazy_at_the_scale_of_their_length():
  runs = [_measure(m) for m in _LENGTHS]
  found = {name: [r[name] for r in runs] for name in runs[0]}
  slopes = {k: fit_slope(_LENGTHS, v).slope for k, v in found.items()}
  assert -1.5 < slopes["change"] < -0.7
  assert -1.2 < slopes["own"] < -0.6
  assert -0.6 < slopes["limit"] < -0.25
  assert np.max(found["loss"]) < 1e-3
  assert found["loss"][-1] < 1e-8
  # At the square root of the length they learn another kernel.
  feature = _measure(_LENGTHS[1], "sqrt_m")
  assert found["change"][1] < 0.1 * feature["change"]


def test_a_step_is_one_of_descent_on_the_loss():
  x, y, context = _data()
  options = {"prefix_bias": 0.3, "count_normalized": False}
  scale, length = 3.0, 20
  other = _data(seed=2)
  prefix, history = train_prefix(
    jax.random.key(0),
    x,
    y,
    context,
    length=length,
    output_scale=scale,
    learning_rate_fraction=0.7,
    num_steps=2,
    x_eval=other[0][:5],
    context_eval=tuple(c[:5] for c in other[2]),
    key_std=0.5,
    value_std=2.0,
    record=True,
    **options,
  )

  def output(params, x, context):
    heads = (y[:, 0] for y in params)
    return prefix_output(*heads, x, context, **options)

  def model(params, x, context):
    start = output(history.initial, x, context)
    return scale * (output(params, x, context) - start)

  def loss(params):
    return jnp.square(model(params, x, context) - y).sum() / 2

  params, losses, outputs = history.initial, [], []
  for _ in range(2):
    losses.append(loss(params))
    outputs.append(model(params, x, context))
    params = jax.tree.map(
      lambda p, g: p - history.learning_rate * g, params, jax.grad(loss)(params)
    )
  for got, want in zip(prefix, params, strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
  np.testing.assert_allclose(history.loss, [*losses, loss(params)], rtol=1e-12)
  np.testing.assert_allclose(history.outputs[:2], outputs, rtol=0, atol=1e-12)
  np.testing.assert_array_equal(history.outputs[-1], history.output)
  np.testing.assert_allclose(
    history.output_eval,
    model(params, other[0][:5], tuple(c[:5] for c in other[2])),
    rtol=0,
    atol=1e-12,
  )
  # In units of the largest eigenvalue, as near as power iteration comes.
  heads = [p[:, 0] for p in history.initial]
  kernel = prefix_ntk(*heads, x, None, context, **options)
  kernel = np.reshape(kernel, (_N * _V, -1))
  rate = 0.7 * length / scale**2 / np.linalg.eigvalsh(kernel)[-1]
  np.testing.assert_allclose(history.learning_rate, rate, rtol=0.01)
  assert history.learning_rate >= rate
  assert abs(np.std(history.initial.key) / 0.5 - 1) < 0.4
  assert abs(np.std(history.initial.value) / 2 - 1) < 0.6


def test_a_trained_prefix_is_one_of_attention():
  x, y, _ = _data()
  prefix, history = train_prefix(
    jax.random.key(0), x, y, length=30, num_steps=3
  )
  assert history.output_eval is None
  assert history.outputs is None
  # Nothing is seen beside the prefix: a context that is masked.
  one = np.zeros((1, 1, _DIM)), np.zeros((1, 1, _V))
  attend = functools.partial(
    prefix_attention,
    x[:, None],
    *one,
    mask=np.zeros((1, _N, 1), bool),
    scale=1.0,
    count_normalized=True,
  )
  change = attend(*prefix) - attend(*history.initial)
  np.testing.assert_allclose(
    30 * change[:, 0], history.output, rtol=0, atol=1e-12
  )


def test_single_precision_and_one_compilation():
  x, y, _ = _data()
  low = jnp.float32(x), jnp.float32(y)
  # Steps are far below the rounding of the entries that they change.
  run = functools.partial(train_prefix, length=4096, num_steps=30)
  prefix, history = run(jax.random.key(0), *low)
  assert {p.dtype for p in jax.tree.leaves((prefix, history))} == {
    jnp.dtype("float32")
  }
  start = history.initial
  heads = [p.astype(jnp.float64)[:, 0] for p in start]
  kernel = prefix_ntk(*heads, x)
  rate = float(history.learning_rate) * 4096
  want = _predicted(np.asarray(kernel), rate, y, 30)[-1]
  assert _relative(np.asarray(history.output), want) < 0.01
  with no_recompilation():
    run(jax.random.key(1), *low, learning_rate_fraction=0.6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"length": 0}, "length must be >= 1, got 0"),
    ({"output_scale": 0.0}, "output_scale must be positive, got 0.0"),
    ({"output_scale": "n"}, "output_scale must be one of 'm', 'sqrt_m', got"),
    (
      {"learning_rate_fraction": -1.0},
      "learning_rate_fraction must be positive, got -1.0",
    ),
    ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
    ({"y": np.ones((3, 1))}, "y must have shape (12, *) = (n, v), got (3, 1)"),
    ({"y": np.ones((12, 1), int)}, "y must have a floating dtype, got int64"),
    ({"x": np.ones(12)}, "x must have shape (*, *) = (n, d), got (12,)"),
    (
      {"x_eval": np.ones((2, 5))},
      "x_eval must have shape (*, 6) = (n, d), got (2, 5)",
    ),
    (
      {"context_eval": _data()[2]},
      "context_eval must be None if x_eval is, got a context",
    ),
    (
      {"context": (np.ones((7, _DIM)), np.ones((6, _V)))},
      "train_prefix: context key length 7 != context value length 6",
    ),
    (
      {"context": (np.ones((7, _DIM)), np.ones((7, 1)))},
      "context must have values of size 2, as the prefix has, got 1",
    ),
    ({"prefix_bias": np.inf}, "prefix_bias must be in (-inf, inf), got inf"),
    ({"record": 1}, "record must be one of False, True, got 1"),
    ({"key_std": -1.0}, "key_std must be non-negative, got -1.0"),
  ],
)
def test_refused(change, message):
  x, y, _ = _data()
  call = {"x": x, "y": y, "length": 4, "num_steps": 1} | change
  with pytest.raises(ValueError, match=re.escape(message)):
    train_prefix(jax.random.key(0), **call)
