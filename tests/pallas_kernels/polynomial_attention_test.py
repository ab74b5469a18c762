"""Polynomial attention's TPU kernels: rungs A, B and C of the ladder."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import attention
from jaxattn.features import monomial_weights
from pallas_kernels.polynomial_attention import (
  mosaic_tpu,
  polynomial_attention,
)
from pallas_kernels.polynomial_attention.operands import multinomial_weights
from tests._recompile import quick_jit
from tests.pallas_kernels._ladder import CALLS, lowered, tpu_interpreter
from tests.pallas_kernels._polynomial import (
  CASES,
  assert_close,
  by_kernel,
  by_reference,
  case,
  cotangent,
  structs,
  value_and_gradients,
)

# --- A: the mathematics, interpreted ---


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_dense_formula(name):
  x, options = case(name, jnp.float64)
  bar = cotangent(x)
  got = by_kernel(x, options, bar)
  assert_close(got, by_reference(x, options, bar), 1e-13)
  # The first keys are hidden: a causal query there sees nothing, and gives 0.
  assert (np.asarray(got[0]) == 0).all((1, 2)).any() == options.is_causal


def test_what_counts_as_local_is_told_apart():
  """Else the test above could not tell exp from the polynomial."""
  x, options = case("causal, exact", jnp.float64)
  bar = cotangent(x)
  exact = by_reference(x, options, bar)
  for change in ({"radius": None}, {"radius": 9.0}, {"chunk_size": 6}):
    other = by_reference(x, options._replace(**change), bar)
    assert all(abs(a - b).max() > 1e-3 for a, b in zip(exact, other))


def test_float32():
  x, options = case("causal, exact", jnp.float32)
  bar = cotangent(x)
  got = by_kernel(x, options, bar)
  assert {y.dtype for y in got} == {jnp.dtype(jnp.float32)}
  assert_close(got, by_reference(x, options, bar), 2e-6)


def test_vmap_equals_a_loop():
  x, options = case("full, grouped", jnp.float32)
  batch = jax.tree.map(lambda y: jnp.stack([y, y[::-1]]), x)
  bars = jnp.stack([cotangent(x)] * 2)
  run = quick_jit(
    functools.partial(value_and_gradients, options=options, interpret=True)
  )
  got = jax.vmap(run)(batch, bars)
  for i in range(2):
    want = run(jax.tree.map(lambda y, i=i: y[i], batch), bars[i])
    assert_close([y[i] for y in got], want, 1e-6)


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("degree", [0, 1, 4])
def test_weights_are_multinomial(dim, degree):
  coefficients = (1.0, 0.5, 2.0, 0.25, 3.0)[: degree + 1]
  want = monomial_weights(dim, coefficients)
  np.testing.assert_allclose(
    multinomial_weights(dim, coefficients), want, rtol=1e-14
  )


def _arrays(dtype=jnp.float64):
  rng = np.random.default_rng(0)
  shapes = (2, 7, 4, 3), (2, 9, 2, 3), (2, 9, 2, 5)
  arrays = [jnp.asarray(rng.standard_normal(s) / 2, dtype) for s in shapes]
  return arrays, jnp.arange(18).reshape(2, 9) % 3 > 0


@pytest.mark.parametrize("is_causal", [False, True])
def test_public_function_and_its_gradient(is_causal):
  arrays, key_mask = _arrays()
  coefficients = np.array([1.0, 1.0, 0.5, 0.2, 0.1])

  def attend(implementation, query, key, value):
    return polynomial_attention(
      query,
      key,
      value,
      degree=4,
      weights=monomial_weights(3, coefficients),
      scale=0.4,
      is_causal=is_causal,
      key_mask=key_mask,
      local="polynomial",
      chunk_size=4,
      implementation=implementation,
    )

  def by_monomials(query, key, value):
    """All products of up to four entries, redundant ones too."""
    key, value = (jnp.repeat(x, 2, 2) for x in (key, value))
    weights = 0
    for j, c in enumerate(coefficients):
      for places in itertools.product(range(3), repeat=j):
        q, k = (
          functools.reduce(jnp.multiply, [x[..., i] for i in places], 1.0)
          * jnp.ones(x.shape[:3])
          for x in (query, key)
        )
        weights += c * 0.4**j * jnp.einsum("btn,bsn->bnts", q, k)
    weights = jnp.where(key_mask[:, None, None], weights, 0)
    if is_causal:
      weights = jnp.where(jnp.tri(7, 9, dtype=bool)[None, None], weights, 0)
    total = weights.sum(-1, keepdims=True)
    weights /= jnp.where(total == 0, 1, total)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)

  def run(f, *args):
    out, vjp = jax.vjp(f, *args)
    return out, *vjp(jnp.cos(out))

  implementations = "interpret", "reference"
  attends = [functools.partial(attend, name) for name in implementations]
  want, *results = (
    quick_jit(functools.partial(run, f))(*arrays)
    for f in (by_monomials, *attends)
  )
  for got in results:
    assert_close(got, want, 1e-12)


def test_narrow_dtypes_are_widened_first():
  arrays, _ = _arrays(jnp.bfloat16)
  call = functools.partial(
    polynomial_attention,
    degree=2,
    weights=multinomial_weights(3, (1.0, 1.0, 0.5)),
    implementation="interpret",
  )
  out = call(*arrays)
  assert out.dtype == jnp.bfloat16
  want = call(*(x.astype(jnp.float32) for x in arrays))
  assert jnp.array_equal(out, want.astype(jnp.bfloat16))


# --- B: copies, races and bounds, simulated ---


@pytest.mark.parametrize("name", ["full, grouped", "causal, exact"])
def test_kernels_do_not_race_nor_read_out_of_bounds(name):
  x, options = case(name, jnp.float32, chunk_size=8)
  bar = cotangent(x)
  with tpu_interpreter() as interpret:
    got = by_kernel(x, options, bar, interpret=interpret)
  assert_close(got, by_reference(x, options, bar), 1e-5)


# --- C: lowering ---


@pytest.mark.parametrize(
  "options", [{}, {"is_causal": True}, {"is_causal": True, "radius": 1.0}]
)
def test_lowers_for_a_tpu(options):
  x, options = structs(degree=3, h=8, **options)
  assert mosaic_tpu.supports(x, options) is None
  run = functools.partial(value_and_gradients, options=options, interpret=False)
  text = lowered(run, x, jax.eval_shape(cotangent, x), platform="tpu")
  # Forward, queries, keys and values; and the state of all keys.
  kernels = 3 if options.is_causal else 4
  assert text.count(f"@{CALLS['tpu']}") == kernels


def test_no_array_holds_the_features():
  x, options = structs(t=4096, s=4096)
  run = functools.partial(value_and_gradients, options=options, interpret=False)
  text = lowered(run, x, jax.eval_shape(cotangent, x), platform="tpu")
  shapes = re.findall(r"tensor<([\dx]+)xf32>", text)
  sizes = [math.prod(map(int, shape.split("x"))) for shape in shapes]
  rows = 2 * 2 * 4096
  assert rows * 32 <= max(sizes) < rows * len(options.weights) // 4


# --- joined to the public function ---


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_kernels_are_taken_where_they_run(platform):
  x = jax.ShapeDtypeStruct((1, 300, 2, 8), jnp.float32)

  def gradients(implementation, *args):
    def loss(*args):
      return attention.polynomial_attention(
        *args, degree=2, radius=1.0, implementation=implementation
      ).sum()

    return jax.grad(loss, (0, 1, 2))(*args)

  def text(implementation):
    run = functools.partial(gradients, implementation)
    return lowered(run, x, x, x, platform=platform)

  # On a GPU that is not there, None takes no kernel.
  chosen = {"tpu": 4, "cuda": 0, "cpu": 0}[platform]
  assert text(None).count(f"@{CALLS['tpu']}") == chosen
  plain = text("xla")
  assert not any(call in plain for call in CALLS.values())
  if platform == "cpu":
    message = "it needs a TPU or an NVIDIA GPU; 'xla' and"
    with pytest.raises(NotImplementedError, match=message):
      text("pallas")
  else:
    named = {"tpu": 4, "cuda": 6}[platform]
    assert text("pallas").count(f"@{CALLS[platform]}") == named


def test_public_gradients_of_any_order_equal_those_of_the_scans():
  arrays, key_mask = _arrays()

  def loss(implementation, *args):
    out = attention.polynomial_attention(
      *args, degree=2, radius=1.0, key_mask=key_mask, chunk_size=4,
      is_causal=True, implementation=implementation,
    )  # fmt: skip
    return (out**3).sum()

  def twice(implementation, *args):
    first = jax.grad(functools.partial(loss, implementation), (0, 1, 2))
    bars, vjp = jax.vjp(first, *args)
    return *bars, *vjp(tuple(map(jnp.cos, bars)))

  got, want = (
    quick_jit(functools.partial(twice, implementation))(*arrays)
    for implementation in ("pallas_interpret", "xla")
  )
  assert_close(got, want, 1e-11)


# --- what is refused ---


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"dtype": "bfloat16"}, "takes float32, got bfloat16"),
    ({"precision": "high"}, "precision None, 'default' or 'highest'"),
    (
      {"chunk_size": 100},
      "chunk_size must be a multiple of 128 on a TPU, got 100: use 128",
    ),
    (
      {"h": 64, "hv": 64, "is_causal": True, "chunk_size": 1024},
      "chunk_size=1024 needs 41 MiB of a TPU's VMEM, which has 16: use "
      "chunk_size=256",
    ),
    (
      {"h": 64, "degree": 3},
      "47905 features of head size 64 and degree 3 need 141 MiB of a TPU's "
      "VMEM, which has 16: use degree=2",
    ),
  ],
)
def test_kernel_says_why_it_cannot(change, reason):
  x, options = structs(**change)
  assert reason in str(mosaic_tpu.supports(x, options))


_ONES = np.ones((1, 4, 2, 2))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"implementation": "fast"}, "implementation must be one of"),
    ({"key": jnp.ones((1, 4, 2, 3))}, "key must have shape (1, 4, 2, 2)"),
    ({"value": jnp.ones((1, 5, 2, 8))}, "value must have shape (1, 4, 2) + Hv"),
    ({"query": jnp.ones((1, 4, 3, 2))}, "the 2 heads of key must divide the 3"),
    ({"query": _ONES[0]}, "query must be floating of 4 dimensions"),
    ({"query": jnp.ones((1, 4, 2, 2), "float32")}, "must have one dtype"),
    ({"key_mask": jnp.ones((1, 4))}, "key_mask must be boolean (1, 4)"),
    ({"is_causal": 1}, "is_causal must be True or False, got 1"),
    ({"local": "exp"}, "local must be 'exact' or 'polynomial', got 'exp'"),
    ({"is_causal": True}, "radius must be a number with is_causal and local"),
    ({"degree": -1}, "degree must be an integer >= 0, got -1"),
    ({"chunk_size": 0}, "chunk_size must be an integer >= 1, got 0"),
    ({"degree": 3}, "weights must be C(2 + 3, 3) = 10 numbers, got 6"),
    ({"weights": [1, 1, 2, 1, 2, 1]}, "weights must be c_j times multinomial"),
  ],
)
def test_bad_input(change, message):
  args = {
    "query": _ONES,
    "key": _ONES,
    "value": _ONES,
    "degree": 2,
    "weights": [1, 1, 1, 0.5, 1, 0.5],
    "implementation": "interpret",
  }
  with pytest.raises(ValueError, match=re.escape(message)):
    polynomial_attention(**args | change)


def test_forced_kernel_says_why_it_cannot():
  with pytest.raises(NotImplementedError, match="takes float32, got float64"):
    polynomial_attention(
      _ONES,
      _ONES,
      _ONES,
      degree=0,
      weights=[1],
      implementation="mosaic_tpu",
    )


@pytest.mark.parametrize("implementation", ["pallas", "pallas_interpret"])
@pytest.mark.parametrize(
  "change",
  [
    {"backward": "closed_form"},
    {"sketch_dim": 4, "rng": np.zeros(2, np.uint32)},
  ],
)
def test_what_has_no_kernel_is_refused(implementation, change):
  with pytest.raises(
    NotImplementedError,
    match=f"implementation='{implementation}' cannot run here: kernels have",
  ):
    attention.polynomial_attention(
      _ONES, _ONES, _ONES, degree=2, radius=1.0, implementation=implementation,
      **change,
    )  # fmt: skip
