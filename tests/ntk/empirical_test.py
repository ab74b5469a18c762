"""Tangent kernels of models: four ways against derivatives of the batch."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import ntk
from jaxattn.models import MLP, mlp_with_taps
from jaxattn.scaling import fit_slope
from tests._recompile import no_recompilation, quick_jit

_MODEL = MLP((32, 32, 3), activation="tanh", use_bias=True)
_TAPS = functools.partial(mlp_with_taps, activation="tanh")


def _inputs(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


@functools.cache
def _setup():
  x1, x2 = _inputs(10, 8), _inputs(4, 8, seed=1)
  params = _MODEL.init(jax.random.key(0), x1)
  # Biases that are not 0, and float64.
  params = jax.tree.map(
    lambda p: p.astype("float64") + 0.1 * _inputs(*p.shape, seed=2), params
  )
  return params, x1, x2


def _dense(apply_fn, params, x1, x2):
  """Contracts the derivatives of whole batches: slow, and nothing to err in."""
  left, right = (
    jax.tree.leaves(jax.jacrev(apply_fn)(params, x)) for x in (x1, x2)
  )
  return sum(
    jnp.einsum(
      "iap,jbp->iajb", a.reshape(*a.shape[:2], -1), b.reshape(*b.shape[:2], -1)
    )
    for a, b in zip(left, right)
  )


@functools.cache
def _expected():
  params, x1, x2 = _setup()
  run = quick_jit(functools.partial(_dense, _MODEL.apply))
  return run(params, x1, x1), run(params, x1, x2)


def _close(got, want, tol=1e-10):
  np.testing.assert_allclose(got, want, rtol=0, atol=tol * np.abs(want).max())


# --- the same kernel by all ways ---


@pytest.mark.parametrize("method", ["jacobian", "ntvp", "structured"])
def test_kernel_in_chunks(method):
  params, x1, x2 = _setup()
  if method == "structured":
    kernel = functools.partial(ntk.structured_ntk, _TAPS)
  else:
    kernel = functools.partial(ntk.empirical_ntk, _MODEL.apply, method=method)
  own, other = _expected()
  whole = kernel(params, x1)
  assert whole.shape == (10, 3, 10, 3)
  _close(whole, own)
  _close(kernel(params, x1, x2), other)
  for chunk_size in (1, 3, 10):
    _close(kernel(params, x1, chunk_size=chunk_size), whole, 1e-12)
  _close(kernel(params, x1, x2, chunk_size=3), other)


@pytest.mark.parametrize("method", ["jacobian", "ntvp"])
def test_trace_is_the_mean_over_outputs(method):
  params, x1, x2 = _setup()
  got = ntk.empirical_ntk(
    _MODEL.apply, params, x1, x2, method=method, trace=True
  )
  want = np.einsum("iaja->ij", _expected()[1]) / 3
  _close(got, want)


def test_kernel_is_symmetric_and_positive():
  params, x1, _ = _setup()
  kernel = ntk.structured_ntk(_TAPS, params, x1).reshape(30, 30)
  _close(kernel, kernel.T, 1e-14)
  eigenvalues = np.linalg.eigvalsh(kernel)
  assert eigenvalues[0] >= -1e-9 * eigenvalues[-1]


def test_sketches_are_unbiased():
  # The mean over 400 sketches is one sketch of as many vectors.
  params, x1, x2 = _setup()
  rng, num = jax.random.key(1), 400 * 64
  got = ntk.sketched_ntk(rng, _MODEL.apply, params, x1, x2, num_vectors=num)
  want = _expected()[1]
  assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)
  # Entries stay within five of the promised standard deviations.
  params, x1, _ = _setup()
  few = ntk.sketched_ntk(rng, _MODEL.apply, params, x1, num_vectors=256)
  want = np.asarray(_expected()[0])
  size = np.sqrt(np.einsum("iaia->ia", want))
  bound = 5 * np.sqrt(2 / 256) * np.multiply.outer(size, size)
  assert (np.abs(few - want) < bound).all()


def test_vector_product():
  params, x1, _ = _setup()
  v = _inputs(10, 3, seed=3)
  got = ntk.ntk_vector_product(_MODEL.apply, params, x1, v)
  _close(got, np.einsum("iajb,jb->ia", _expected()[0], v))


# --- layers that share their weights ---


def _shared(params, x, taps=None):
  """One layer, applied at every position, its outputs summed by a readout."""
  z = x @ params + (0 if taps is None else taps[0])
  return jnp.tanh(z).sum((1, 2))[:, None] * jnp.array([[1.0, -2.0]]), (
    ntk.DenseTap(x, z),
  )


@pytest.mark.parametrize(("d_in", "d_out"), [(30, 40), (3, 4)])
def test_places_that_share_weights(d_in, d_out):
  # 5^2 * 70 < 1200: by places. 5^2 * 7 > 12: by gradients.
  x1, x2 = _inputs(4, 5, d_in), _inputs(3, 5, d_in, seed=1)
  params = _inputs(d_in, d_out, seed=2) / d_in
  got = ntk.structured_ntk(_shared, params, x1, x2)
  _close(got, _dense(lambda *args: _shared(*args)[0], params, x1, x2))


def _twice(params, x, taps=None):
  """One matrix in two layers: one tap, with an axis of places."""
  taps = jnp.zeros((1, x.shape[0], 2, x.shape[1])) if taps is None else taps
  z1 = x @ params + taps[0][:, 0]
  hidden = jnp.tanh(z1)
  z2 = hidden @ params + taps[0][:, 1]
  both = ntk.DenseTap(jnp.stack((x, hidden), 1), jnp.stack((z1, z2), 1))
  return jnp.sin(z2), (both,)


def test_weights_that_are_used_twice():
  x, params = _inputs(5, 3), _inputs(3, 3, seed=1)
  got = ntk.structured_ntk(_twice, params, x, chunk_size=2)
  _close(got, _dense(lambda *args: _twice(*args)[0], params, x, x))


def _embedding(params, ids, taps=None):
  z = params[ids] + (0 if taps is None else taps[0])
  return jnp.tanh(z.sum(1)), (ntk.DenseTap(ids, z),)


def test_rows_of_a_table():
  ids = np.random.default_rng(0).integers(0, 6, (7, 4))
  params = _inputs(6, 3)
  got = ntk.structured_ntk(_embedding, params, ids[:5], ids[5:])
  want = ntk.empirical_ntk(
    lambda *args: _embedding(*args)[0], params, ids[:5], ids[5:]
  )
  _close(got, want)


def test_python_numbers_as_parameters():
  got = ntk.empirical_ntk(lambda p, x: p * x, 2.0, _inputs(3, 1))
  _close(got[:, 0, :, 0], np.outer(*[_inputs(3, 1)] * 2))


# --- precision and memory ---


@pytest.mark.any_x64
@pytest.mark.parametrize("method", ["jacobian", "structured", "sketched"])
def test_sums_of_16_bits_are_wide(method):
  # 4096 ones: bfloat16 alone holds no sum above 256 exactly.
  x = jnp.ones((2, 4096), jnp.bfloat16)
  params = jnp.ones((4096, 1), jnp.bfloat16)

  def model(params, x, taps=None):
    z = x @ params + (0 if taps is None else taps[0])
    return z, (ntk.DenseTap(x, z),)

  def apply_fn(params, x):
    return model(params, x)[0]

  if method == "structured":
    got = ntk.structured_ntk(model, params, x)
  elif method == "jacobian":
    got = ntk.empirical_ntk(apply_fn, params, x, chunk_size=1)
  else:
    # Sums over directions; one of them alone is rounded to 8 bits.
    rng = jax.random.key(0)
    got = ntk.sketched_ntk(rng, apply_fn, params, x, num_vectors=4096)
  assert got.dtype == jnp.bfloat16
  tol = 5 * np.sqrt(2 / 4096) if method == "sketched" else 0
  np.testing.assert_allclose(got.astype("float32"), 4096, rtol=tol)


@pytest.mark.any_x64
@pytest.mark.parametrize("method", ["jacobian", "structured"])
def test_chunks_in_float32(method):
  x, model = _float32(7, 5), MLP((16, 2))
  params = model.init(jax.random.key(0), x)
  if method == "structured":
    kernel = functools.partial(ntk.structured_ntk, mlp_with_taps, params, x)
  else:
    kernel = functools.partial(ntk.empirical_ntk, model.apply, params, x)
  assert kernel().dtype == jnp.float32
  _close(kernel(chunk_size=3), kernel(), 1e-5)


def _held(kernel, *args):
  """Bytes beside arguments and result."""
  run = jax.jit(kernel).lower(*args).compile()
  return run.memory_analysis().temp_size_in_bytes


def _float32(*shape):
  return jnp.asarray(_inputs(*shape), jnp.float32)


@pytest.mark.any_x64
def test_memory_of_blocks():
  n, chunk, outputs = 64, 4, 2
  result = 4 * (n * outputs) ** 2
  x = _float32(n, 8)
  params = MLP((128, 128, outputs)).init(jax.random.key(0), x)
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  held = _held(
    lambda p, x: ntk.empirical_ntk(
      MLP((128, 128, outputs)).apply, p, x, chunk_size=chunk
    ),
    params,
    x,
  )
  assert held < result + x.nbytes + 2.5 * 4 * chunk * outputs * size
  # By gradients: 20^2 * 160 > 64 * 96.
  x, params = _float32(n, 20, 64), _float32(64, 96)
  held = _held(
    lambda p, x: ntk.structured_ntk(_shared, p, x, chunk_size=chunk), params, x
  )
  size = 64 * 96 + 20 * (64 + 96)
  assert held < result + x.nbytes + 2.5 * 4 * chunk * outputs * size


def _many(params, x, taps=None):
  z = x @ params + (0 if taps is None else taps[0])
  return jnp.sin(z.sum(1))[:, :8], (ntk.DenseTap(x, z),)


@pytest.mark.any_x64
def test_memory_of_places():
  # By places, 8^2 * 256 = 128^2: pairs of outputs at all places are 8 results.
  n, outputs = 64, 8
  x, params = _float32(n, 8, 128), _float32(128, 128)
  held = _held(functools.partial(ntk.structured_ntk, _many), params, x)
  result, size = 4 * (n * outputs) ** 2, 8 * 128
  assert held < 2 * result + 1.5 * (x.nbytes + 4 * n * outputs * size)


def test_pytrees_of_data():
  def apply_fn(params, batch):
    return (batch["x"] * batch["scale"][:, None]) @ params

  batch = {"x": _inputs(5, 3), "scale": _inputs(5, seed=1)}
  params = _inputs(3, 2, seed=2)
  got = ntk.empirical_ntk(apply_fn, params, batch, chunk_size=2)
  rows = batch["x"] * batch["scale"][:, None]
  want = np.einsum("ij,ab->iajb", rows @ rows.T, np.eye(2))
  _close(got, want)


# --- models ---


def test_flax_model_without_taps():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(4, (3,))(x[..., None])
      return nn.Dense(2)(nn.gelu(x).mean(1))

  x = _inputs(3, 6).astype("float32")
  model = Model()
  params = model.init(jax.random.key(0), x)
  got = ntk.empirical_ntk(model.apply, params, x)
  assert got.dtype == jnp.float32
  want = quick_jit(functools.partial(_dense, model.apply))(params, x, x)
  _close(got, want, 1e-6)
  with pytest.raises(ValueError, match="models without taps are for empirical"):
    ntk.structured_ntk(model.apply, params, x)


def test_gap_to_infinite_width_falls_like_one_over_root_width():
  x = _inputs(6, 5).astype("float32")
  want = ntk.mlp_ntk(x, depth=1)[1]
  keys = jax.random.split(jax.random.key(0), 16)

  def gaps(width):
    def gap(rng):
      params = MLP((width, 1)).init(rng, x)
      got = ntk.structured_ntk(mlp_with_taps, params, x)[:, 0, :, 0]
      return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)

    return quick_jit(jax.vmap(gap))(keys)

  widths = [2**8, 2**10, 2**12, 2**14]
  medians = [np.median(gaps(width)) for width in widths]
  assert -0.6 < fit_slope(widths, medians).slope < -0.4


def test_deep_limit():
  x = _inputs(4, 5).astype("float32")
  want = ntk.mlp_ntk(x, depth=3)[1]
  params = MLP((1024, 1024, 1024, 1)).init(jax.random.key(0), x)
  got = ntk.structured_ntk(mlp_with_taps, params, x)[:, 0, :, 0]
  # The relative deviation is about sqrt(depth / width), 0.05.
  assert np.linalg.norm(got - want) < 0.15 * np.linalg.norm(want)


# --- blocks ---


def test_blocks_on_and_above_the_diagonal_are_mirrored():
  seen = []

  def fn(a, b):
    jax.debug.callback(lambda r, c: seen.append((int(r), int(c))), a[0], b[0])
    return jnp.exp(-jnp.square(a[:, None] - b[None]))

  x = jnp.arange(5.0)
  got = jax.jit(lambda x: ntk.blocked_gram(fn, x, chunk_size=2))(x)
  jax.effects_barrier()
  assert sorted(seen) == [(0, 0), (0, 2), (0, 4), (2, 2), (2, 4), (4, 4)]
  np.testing.assert_allclose(got, np.exp(-(np.subtract.outer(x, x) ** 2)))
  rectangle = ntk.blocked_gram(fn, x, x[:3], chunk_size=2)
  np.testing.assert_allclose(rectangle, got[:, :3])


def test_blocks_are_few_and_equal():
  sizes = set()

  def fn(a, b):
    sizes.update((len(a), len(b)))
    return a[:, None] * b[None]

  x = jnp.arange(41.0)
  got = ntk.blocked_gram(fn, x, chunk_size=40)
  assert sizes == {21}
  np.testing.assert_array_equal(got, np.outer(x, x))


# --- conventions and refusals ---


def test_compiles_once():
  params, x1, _ = _setup()
  rng, v = jax.random.key(0), jnp.ones((10, 3))
  other = jax.tree.map(lambda p: 2 * p, params)

  def run(params):
    ntk.empirical_ntk(_MODEL.apply, params, x1)
    ntk.structured_ntk(_TAPS, params, x1)
    ntk.sketched_ntk(rng, _MODEL.apply, params, x1, num_vectors=2)
    ntk.ntk_vector_product(_MODEL.apply, params, x1, v)

  run(params)
  with no_recompilation():
    run(other)


def _refused(call: Any, message: str) -> None:
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


def test_refused():
  params, x1, x2 = _setup()
  model = functools.partial(ntk.empirical_ntk, _MODEL.apply, params)
  for call, message in (
    (
      lambda: model(x1, method="foo"),
      "method must be one of 'jacobian', 'ntvp', got 'foo'; structured_ntk and "
      "sketched_ntk are functions of their own",
    ),
    (
      lambda: model(x1, x2[:, :7]),
      "x1 and x2 must agree in all but the first axis, got float64[10,8] and "
      "float64[4,7]",
    ),
    (lambda: model(x1, chunk_size=0), "chunk_size must be >= 1, got 0"),
    (lambda: model(x1[:0]), "x1 must be one or more arrays (n, ...)"),
    (
      lambda: model({"a": x1, "b": x2}),
      "arrays of x1 must have one first axis, got shapes [(10, 8), (4, 8)]",
    ),
    (
      lambda: ntk.empirical_ntk(lambda p, x: x[:, 0], params, x1),
      "apply_fn must return (10, O) for 10 data, got (10,)",
    ),
    (
      lambda: ntk.empirical_ntk(lambda p, x: x @ p["w"], {"w": 1}, x1),
      "params['w'] must have a floating dtype, got int",
    ),
    (
      lambda: ntk.empirical_ntk(lambda p, x: x, {}, x1),
      "params must hold at least one array, got {}",
    ),
    (
      lambda: ntk.structured_ntk(lambda p, x, taps: x, params, x1),
      "-> (y, tuple of DenseTap), got one whose taps have no default",
    ),
    (
      lambda: ntk.structured_ntk(_TAPS, params, x1, chunk_size=-1),
      "chunk_size must be >= 1, got -1",
    ),
    (
      lambda: ntk.structured_ntk(lambda p, x, taps=None: x, params, x1),
      "apply_with_taps must be (params, x, taps=None) -> (y, tuple of DenseTap)"
      ", got (10, 8) back; models without taps are for empirical_ntk",
    ),
    (
      lambda: ntk.sketched_ntk(
        jax.random.key(0), _MODEL.apply, params, x1, num_vectors=0
      ),
      "num_vectors must be >= 1, got 0",
    ),
    (
      lambda: ntk.ntk_vector_product(_MODEL.apply, params, x1, x1),
      "v must have shape (10, 3) = (n, O), got (10, 8)",
    ),
    (
      lambda: ntk.blocked_gram(lambda a, b: a[:, 0], x1, chunk_size=4),
      "fn must return (4, ..., 4, ...), an even number of axes, got (4,)",
    ),
    (
      lambda: ntk.blocked_gram(lambda a, b: a @ b.T, x1, chunk_size=0),
      "chunk_size must be >= 1, got 0",
    ),
  ):
    _refused(call, message)


def test_refused_tap():
  def wrong(params, x, taps=None):
    return x, (ntk.DenseTap(x[0], x),)

  _refused(
    lambda: ntk.structured_ntk(wrong, {}, _inputs(4, 3)),
    "inputs of a DenseTap must have shape (4, *) = outputs but for the last "
    "axis, got (3,)",
  )
