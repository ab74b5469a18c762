"""Calls that the conformance suite makes of each attention function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests._dense import float64, value_and_vjp
from tests._recompile import quick_jit
from tests.conformance._attention import MEMBERS, B, H, K, N, T

all_members = pytest.mark.parametrize("name", sorted(MEMBERS))
# Those that are public themselves, with all that they refuse.
all_public = pytest.mark.parametrize(
  "name", sorted(name for name, m in MEMBERS.items() if not m.adapted)
)
LOGITS = (B, N, T, T)
NARROW = ["bfloat16", "float16", "float32"]
DTYPES = NARROW + ["float64"] * jax.config.read("jax_enable_x64")
# Values are not as wide as keys, to tell the two apart.
SQUARE = ((B, T, N, H), (B, T, K, H), (B, T, K, H - 2))
MULTI_QUERY = ((2, 13, 3, 5), (2, 19, 1, 5), (2, 19, 1, 7))
UNBATCHED = ((13, 4, 6), (9, 2, 6), (9, 2, 6))


def taking(parameter):
  return [name for name in sorted(MEMBERS) if MEMBERS[name].takes(parameter)]


def inputs(shapes=SQUARE, dtype="float32"):
  """Cotangent, query, key and value."""
  rng = np.random.default_rng(0)
  query, _, value = shapes
  shapes = (query[:-1] + value[-1:], *shapes)
  return [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]


def mask_of(member):
  """A random mask of full shape; the first batch element hides everything."""
  seen = np.random.default_rng(1).random(LOGITS) < 0.6
  seen = np.array(member.hide(seen))
  seen[0] = False
  return seen


@functools.cache
def compiled(name, is_causal=False):
  """(cotangent, query, key, value, seen) -> output, three gradients."""
  options = {"is_causal": True} if is_causal else {}

  def run(cotangent, query, key, value, seen=None):
    fn = functools.partial(MEMBERS[name].call, seen=seen, **options)
    return value_and_vjp(fn, cotangent, query, key, value)

  return quick_jit(run)


@functools.cache
def _compiled_oracle(name):
  def run(cotangent, query, key, value, seen):
    fn = functools.partial(MEMBERS[name].oracle, seen=seen, scale=None)
    return value_and_vjp(fn, cotangent, query, key, value)

  return quick_jit(run)


def oracle(name, *args, seen=None):
  """What ``compiled`` should give, in float64 in either mode of x64."""
  if seen is None:
    seen = np.ones((1,) * args[0].ndim, bool)
  with jax.enable_x64(True):
    out, grads = _compiled_oracle(name)(*float64(*args), seen)
  return [np.asarray(x) for x in (out, *grads)]


def flat(result):
  out, grads = result
  return [out, *grads]


def assert_close(got, want, eps, atol=None):
  """Elementwise within a few ``eps``, relative to the scale of the array."""
  for g, w in zip(got, want, strict=True):
    g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
    bound = eps * np.abs(w).max() if atol is None else atol
    np.testing.assert_allclose(g, w, rtol=eps, atol=bound)


def eps_of(dtype):
  return float(jnp.finfo(dtype).eps)


@functools.cache
def masked(name, dtype):
  """One masked call and its oracle: several tests look at it."""
  args, seen = inputs(dtype=dtype), mask_of(MEMBERS[name])
  return flat(compiled(name)(*args, seen)), oracle(name, *args, seen=seen)
