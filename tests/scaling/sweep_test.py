"""Sweeps: keys, methods, meshes, memory, and that nothing compiles twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxattn import scaling
from jaxattn.scaling import sweep as run_sweep
from tests._recompile import log_compilations, no_recompilation

_KEY = jax.random.key(0)
# Draws are of this size in all methods, so that their beginnings agree.
_DRAWN = 256
_DIM, _DATA, _STEPS = 3, 8, 10
_X = np.random.default_rng(0).normal(size=(_DATA, _DIM)).astype(np.float32)
_WIDTHS = (12, 16, 60)


def _train(rng, width, max_width=None):
  """Descent of a two-layer network, in float32, padded or not."""
  size = width if max_width is None else max_width
  drawn = jax.random.normal(rng, (_DRAWN, _DIM + 1), jnp.float32)[:size]
  w, a = drawn[:, 1:], drawn[:, 0] * (jnp.arange(size) < width)

  def output(w):
    return jax.nn.relu(_X @ w.T) @ a / jnp.sqrt(jnp.float32(width))

  def step(w, _):
    loss, grad = jax.value_and_grad(lambda w: ((output(w) - 1) ** 2).sum())(w)
    return w - 0.02 * grad, loss

  w, losses = lax.scan(step, w, None, length=_STEPS)
  return {"losses": losses, "output": output(w)}


@functools.cache
def _swept():
  return run_sweep(_KEY, _train, _WIDTHS, 4)


@pytest.mark.any_x64
def test_a_width_alone_is_the_same_bitwise():
  alone = run_sweep(_KEY, _train, (16,), 4).values
  among = _swept()
  np.testing.assert_array_equal(among.widths, _WIDTHS)
  assert among.values["losses"].shape == (3, 4, _STEPS)
  assert (alone["losses"][0, :, -1] < alone["losses"][0, :, 0] / 2).all()
  for name, values in alone.items():
    np.testing.assert_array_equal(values[0], among.values[name][1])


@pytest.mark.parametrize(
  "option",
  [
    {"method": "padded", "max_width": 70},
    {"method": "padded", "memory_limit": 1},
    {"method": "buckets"},
  ],
)
def test_padded_agrees_with_per_width(option):
  got = run_sweep(_KEY, _train, _WIDTHS, 4, **option).values
  for name, values in _swept().values.items():
    np.testing.assert_allclose(got[name], values, rtol=1e-5, atol=1e-5)


def _sizes(rng, width, max_width=None):
  return {"width": jnp.int32(width), "size": max_width or width, "rng": rng}


def test_what_methods_call_with():
  widths = (17, 4, 1, 16, 64, 65)
  by_method = {
    method: run_sweep(_KEY, _sizes, widths, 2, method=method).values
    for method in ("per_width", "padded", "buckets")
  }
  sizes = {
    "per_width": widths,
    "padded": [65] * 6,
    "buckets": [64, 4, 1, 16, 64, 256],
  }
  for method, values in by_method.items():
    np.testing.assert_array_equal(values["width"][:, 0], widths)
    np.testing.assert_array_equal(values["size"][:, 1], sizes[method])
    for i, width in enumerate(widths):
      for seed in range(2):
        want = jax.random.fold_in(jax.random.fold_in(_KEY, width), seed)
        assert values["rng"][i, seed] == want


def test_more_seeds_keep_the_first():
  few, many = (
    run_sweep(_KEY, _sizes, (4,), n).values["rng"][0] for n in (2, 5)
  )
  assert (few == many[:2]).all()


def test_one_compilation_a_width_and_none_again():
  traces, other = [], jax.random.key(1)

  def fn(rng, width):
    traces.append(width)
    return jax.random.normal(rng, (width,)).sum()

  with log_compilations() as names:
    run_sweep(_KEY, fn, (3, 5, 7), 2)
  assert sorted(traces) == [3, 5, 7]
  assert names.count("jit(_run)") == 3
  with no_recompilation():
    run_sweep(other, fn, (3, 5, 7), 2)


def test_padded_compiles_once():
  def fn(rng, width, max_width):
    inside = jnp.arange(max_width) < width
    return (inside * jax.random.normal(rng, (max_width,))).sum()

  with log_compilations() as names:
    run_sweep(_KEY, fn, (3, 5, 7), 2, method="padded")
  assert names.count("jit(_run)") == 1
  with log_compilations() as names:
    run_sweep(_KEY, fn, (3, 4, 5, 15), 2, method="buckets")
  assert names.count("jit(_run)") == 2


def _total(rng, width, x, y, max_width=None):
  return {"total": x.sum() + y["y"] * width, "width": jnp.int32(width)}


def test_args_are_shared_and_may_change():
  x, other, y = jnp.arange(3.0), jnp.arange(1.0, 4.0), {"y": jnp.ones(())}
  for method in ("per_width", "padded"):
    call = functools.partial(run_sweep, _KEY, _total, (3, 5), 2, method=method)
    first = call(args=(x, y)).values["total"]
    with no_recompilation():
      second = call(args=(other, y)).values["total"]
    np.testing.assert_array_equal(first, [[6, 6], [8, 8]])
    np.testing.assert_array_equal(second, first + 3)


# --- memory ---


def _large(rng, width):
  return jax.random.normal(rng, (1000, width), jnp.float32).max()


def _temporary(memory_limit):
  run = jax.jit(
    lambda rng: (
      run_sweep(rng, _large, (1000,), 6, memory_limit=memory_limit).values
    )
  )
  return run.lower(_KEY).compile().memory_analysis().temp_size_in_bytes


def test_seeds_run_in_turn_where_memory_is_short():
  # One seed keeps a million random bits, 8 bytes, and what they become.
  together, pairs, alone = map(_temporary, (2**31, 2 * 25_000_000, 1))
  assert alone < 25_000_000
  assert 1.5 * alone < pairs < 50_000_000
  assert together > 3.5 * alone
  want = run_sweep(_KEY, _large, (1000,), 6).values
  got = run_sweep(_KEY, _large, (1000,), 6, memory_limit=1).values
  np.testing.assert_array_equal(got, want)


# --- meshes ---


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_devices_share_the_seeds(kind):
  axis = getattr(jax.sharding.AxisType, kind)
  mesh = jax.make_mesh((2, 2), ("a", "b"), (axis, axis))
  for options in ({}, {"method": "padded"}):
    got = run_sweep(_KEY, _train, _WIDTHS[:2], 4, mesh=mesh, **options).values
    assert len(got["output"].sharding.device_set) == 4
    assert got["output"].addressable_shards[0].data.shape == (2, 1, _DATA)
    for name, values in _swept().values.items():
      np.testing.assert_allclose(got[name], values[:2], rtol=1e-5, atol=1e-5)


# --- refused ---


def _grows(rng, width):
  return {"fine": rng, "state": [jnp.zeros(width)]}


def _other_tree(rng, width):
  return {"a": 0.0} if width == 4 else {"b": 0.0}


def _other_dtype(rng, width):
  return jnp.zeros(2, jnp.int8 if width == 4 else jnp.float32)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"widths": ()}, r"widths must be different, at least one, got \(\)"),
    ({"widths": (4, 8, 4)}, r"different, at least one, got \(4, 8, 4\)"),
    ({"widths": (4, 0)}, "widths must be >= 1, got 0"),
    ({"widths": (4, 8.0)}, r"widths must be an integer >= 1, got 8\.0"),
    ({"num_seeds": 0}, "num_seeds must be >= 1, got 0"),
    ({"memory_limit": 0}, "memory_limit must be >= 1, got 0"),
    ({"method": "mask"}, "method must be one of 'per_width', 'padded', 'buck"),
    ({"max_width": 9}, 'max_width is of method "padded", got 9 and "per_wid'),
    ({"method": "padded", "max_width": 7}, "max_width must be >= 8, got 7"),
    (
      {"fn": _grows},
      r"do not depend on the width, got \['state'\]\[0\] as float64\(4,\) at "
      r"width 4 and as float64\(8,\) at width 8",
    ),
    ({"fn": _other_tree}, r"got \['[ab]'\] as .*None"),
    ({"fn": _other_dtype}, r"got the result as int8\(2,\) .* float32\(2,\)"),
  ],
)
def test_refused(change, message):
  arguments = {"fn": _sizes, "widths": (4, 8), "num_seeds": 2} | change
  with pytest.raises(ValueError, match=message):
    scaling.sweep(_KEY, **arguments)


def test_devices_share_the_args():
  mesh = jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,))
  args = jnp.arange(3.0), {"y": jnp.ones(())}
  got = run_sweep(_KEY, _total, (3, 5), 2, args=args, mesh=mesh).values
  np.testing.assert_array_equal(got["total"], [[6, 6], [8, 8]])


def test_mesh_must_divide_the_seeds():
  mesh = jax.make_mesh((4,), ("a",), (jax.sharding.AxisType.Auto,))
  message = "num_seeds must be a multiple of the 4 devices of mesh, got 6"
  with pytest.raises(ValueError, match=message):
    run_sweep(_KEY, _sizes, (4,), 6, mesh=mesh)
