"""Tensor attention: oracles, bounds, symmetries, memory, refused input."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import (
  moment_init,
  moment_update,
  polynomial_attention,
  polynomial_order_attention,
  polynomial_tensor_attention,
  tensor_attention,
  tensor_logit_radius,
  tensor_moment_query,
)
from jaxattn.features import (
  attention_error_bound,
  polynomial_coefficients,
  polynomial_error,
)
from tests._dense import dense_attention, value_and_vjp
from tests._jaxpr import array_sizes
from tests._recompile import quick_jit
from tests.attention._tensor import (
  dense,
  dense_pair,
  one_head,
  polynomial,
  relative,
  uniform,
)

# --- oracles ---


def test_exact_is_a_sum_over_all_pairs():
  (t, s1, s2), d, hv = (6, 5, 4), 3, 2
  q, k1, k2 = (np.asarray(x) for x in uniform(0, (t, d), (s1, d), (s2, d)))
  v1, v2 = (np.asarray(x) for x in uniform(1, (s1, hv), (s2, hv)))
  want = np.zeros((t, hv))
  for i in range(t):
    total = 0.0
    for j, k in itertools.product(range(s1), range(s2)):
      weight = np.exp((q[i] * k1[j] * k2[k]).sum() / np.sqrt(d))
      want[i] += weight * v1[j] * v2[k]
      total += weight
    want[i] /= total
  arrays = [x[:, None] for x in (q, k1, k2, v1, v2)]
  for chunk_size in (None, 4):
    got = tensor_attention(*arrays, chunk_size=chunk_size)[:, 0]
    np.testing.assert_allclose(got, want, atol=1e-13)


def test_one_second_token_of_ones_is_ordinary_attention():
  q, k, v = uniform(0, (2, 7, 4, 3), (2, 5, 2, 3), (2, 5, 2, 3))
  ones = jnp.ones((2, 1, 2, 3))
  got = tensor_attention(q, k, ones, v, ones)
  np.testing.assert_allclose(got, dense_attention(q, k, v)[0], atol=1e-13)
  # jax.nn's softmax is one of float32.
  want = jax.nn.dot_product_attention(q, k, v)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("backward", ["surrogate", "closed_form"])
def test_one_key_sequence_is_polynomial_attention(backward):
  q, k, v = uniform(0, (2, 37, 4, 3), (2, 37, 2, 3), (2, 37, 2, 2))
  options = {"degree": 4, "radius": 1.0, "backward": backward}
  options["is_causal"] = backward == "surrogate"
  plain = functools.partial(
    polynomial_attention, local="polynomial", center_keys=False, **options
  )

  def ours(q, k, v):
    return polynomial_order_attention(q, (k,), (v,), chunk_size=5, **options)

  def pull(fn):
    run = quick_jit(functools.partial(value_and_vjp, fn))
    return run(jnp.cos(q[..., :2]), q, k, v)

  assert relative(pull(ours), pull(plain)) < 1e-13


@pytest.mark.parametrize("is_causal", [False, True])
def test_four_sequences_and_masks(is_causal):
  n, d = 9, 2
  q, *keys = uniform(0, *[(n, d)] * 4)
  values, mask = uniform(1, *[(n, d)] * 3), np.arange(n) < n - 3
  masks = None if is_causal else (None, mask, None)

  def ours(q, keys, values):
    out = polynomial_order_attention(
      q[:, None],
      tuple(k[:, None] for k in keys),
      tuple(v[:, None] for v in values),
      degree=4,
      radius=1.0,
      is_causal=is_causal,
      key_masks=masks,
      chunk_size=4,
    )
    return out[:, 0]

  want = functools.partial(
    dense, kernel=polynomial(4, 1.0), is_causal=is_causal
  )
  kept = n if is_causal else n - 3

  def shortened(q, keys, values):
    cut = [
      [x[: kept if r == 1 else n] for r, x in enumerate(xs)]
      for xs in (keys, values)
    ]
    return want(q, *cut)

  got, want = (
    quick_jit(functools.partial(value_and_vjp, fn))(jnp.cos(q), q, keys, values)
    for fn in (ours, shortened)
  )
  assert relative(got, want) < 1e-12


def _each_head(query, keys, values, masks, kernel):
  """Dense attention of grouped heads to the keys that masks show."""
  groups = query.shape[1] // keys[0].shape[1]
  keys, values = (
    [jnp.repeat(x, groups, 1)[m] for x, m in zip(xs, masks, strict=True)]
    for xs in (keys, values)
  )
  one = functools.partial(dense, kernel=kernel)
  return jax.vmap(one, 1, 1)(query, keys, values)


def test_lengths_and_masks_of_their_own():
  (t, s1, s2), d, hv = (6, 5, 4), 3, 2
  q, k1, k2 = uniform(0, (t, 4, d), (s1, 2, d), (s2, 2, d), bound=0.7)
  v1, v2 = uniform(1, (s1, 2, hv), (s2, 2, hv))
  masks = np.arange(s1) != 1, np.arange(s2) < 3
  radius, degree = float(tensor_logit_radius(q, k1, k2)), 6

  def pull(fn):
    run = quick_jit(functools.partial(value_and_vjp, fn))
    return run(jnp.cos(q[..., :hv]), q, k1, k2, v1, v2)

  def by_hand(kernel):
    return pull(lambda q, k1, k2, *v: _each_head(q, (k1, k2), v, masks, kernel))

  options = {"key_mask1": masks[0], "key_mask2": masks[1], "chunk_size": 4}
  exact = by_hand(jnp.exp)
  assert relative(
    pull(functools.partial(tensor_attention, **options)), exact
  ) < (1e-12)
  options |= {"degree": degree, "radius": radius}
  ours = functools.partial(polynomial_tensor_attention, **options)
  assert relative(pull(ours), by_hand(polynomial(degree, radius))) < 1e-11
  eps = polynomial_error(polynomial_coefficients(degree, radius), radius)
  closed = pull(functools.partial(ours, backward="closed_form"))
  assert relative(closed, exact) <= 5 * eps


def test_closed_form_of_three_sequences():
  n, d = 7, 2
  q, *keys = uniform(0, *[(n, 1, d)] * 4)
  arrays = q, tuple(keys), tuple(uniform(1, *[(n, 1, d)] * 3))
  eps = polynomial_error(polynomial_coefficients(6, 1.4), 1.4)
  ours = functools.partial(
    polynomial_order_attention, degree=6, radius=1.4, backward="closed_form"
  )
  shown = [np.ones(n, bool)] * 3
  want = functools.partial(_each_head, masks=shown, kernel=jnp.exp)
  got, want = (
    quick_jit(functools.partial(value_and_vjp, fn))(jnp.cos(q), *arrays)
    for fn in (ours, want)
  )
  assert relative(got, want) <= 5 * eps


def test_later_tokens_change_no_bit():
  n, cut = 11, 6
  q, *keys = uniform(0, *[(n, 2, 3)] * 4)
  values = uniform(1, *[(n, 2, 3)] * 3)
  attend = functools.partial(
    polynomial_order_attention, degree=2, radius=1.0, is_causal=True,
    chunk_size=4,
  )  # fmt: skip
  changed = [x.at[cut:].multiply(-3.7) for x in (q, *keys, *values)]
  outs = [
    attend(x[0], tuple(x[1:4]), tuple(x[4:]))
    for x in ((q, *keys, *values), changed)
  ]
  np.testing.assert_array_equal(outs[0][:cut], outs[1][:cut])
  assert (outs[0][cut:] != outs[1][cut:]).all()


def test_two_sequences_are_the_tensor_program():
  arrays = [jnp.ones((1, 20, 2, 3))] * 5
  options = {"degree": 2, "radius": 1.0}

  def order(q, k1, k2, v1, v2):
    return polynomial_order_attention(q, (k1, k2), (v1, v2), **options)

  pair = functools.partial(polynomial_tensor_attention, **options)
  programs = [str(jax.make_jaxpr(f)(*arrays)) for f in (order, pair)]
  assert programs[0] == programs[1]


# --- errors ---


@pytest.mark.parametrize(
  ("bound", "radius", "bounds", "causal_degree"),
  [
    (0.7, 0.374, {2: 2.2e-3, 4: 3.8e-6, 6: 3.1e-9}, 6),
    (1.0, 1.114, {2: 5.4e-2, 4: 8.6e-4, 6: 6.4e-6}, 4),
    (1.4, 2.79, {2: 0.62, 4: 6.7e-2, 6: 3.3e-3}, 2),
  ],
)
def test_error_is_below_its_bound(bound, radius, bounds, causal_degree):
  arrays = one_head(0, 40, 4, bound)
  largest = float(tensor_logit_radius(*arrays[:3], scale=0.5))
  pairs = (arrays[3][0, :, None, 0] * arrays[4][0, None, :, 0]).reshape(-1, 4)
  for degree, want in bounds.items():
    # The bound itself, rounded to two digits, for values whose products cover
    # [-1, 1].
    eps = polynomial_error(polynomial_coefficients(degree, radius), radius)
    unit = attention_error_bound(
      eps, jnp.array([-1.0, 1.0]).reshape(1, 2, 1, 1)
    )
    np.testing.assert_allclose(unit.max(), want, rtol=0.05)
    coefficients = polynomial_coefficients(degree, largest)
    eps = polynomial_error(coefficients, largest)
    limit = attention_error_bound(eps, pairs[None, :, None])[0]
    for is_causal in (False, True) if degree == causal_degree else (False,):
      options = {"scale": 0.5, "is_causal": is_causal}
      out = polynomial_tensor_attention(
        *arrays, degree=degree, radius=largest, **options
      )
      error = jnp.abs(out - dense_pair(*arrays, **options)).max((0, 1))
      assert (error <= limit).all()
      assert (error > 0).all()
      if bound == 0.7 and not is_causal:
        # Errors of so many pairs cancel; a few times what they come to here.
        assert error.max() < {2: 5e-5, 4: 1.5e-7, 6: 1.5e-10}[degree]


# --- gradients ---


def test_gradient_is_the_closed_form():
  n, d, scale = 12, 3, 0.6
  arrays = one_head(2, n, d)
  (d_out,) = uniform(5, (1, n, 1, d))
  got = value_and_vjp(
    functools.partial(tensor_attention, scale=scale, chunk_size=5),
    d_out,
    *arrays,
  )[1]
  q, k1, k2, v1, v2 = (x[0, :, 0] for x in arrays)
  p = jax.nn.softmax(
    scale * jnp.einsum("ic,jc,kc->ijk", q, k1, k2).reshape(n, -1)
  ).reshape(n, n, n)
  c = d_out[0, :, 0]
  out = jnp.einsum("ijk,jc,kc->ic", p, v1, v2)
  delta = (c * out).sum(-1)[:, None, None]
  ds = p * (jnp.einsum("ic,jc,kc->ijk", c, v1, v2) - delta)
  want = (
    scale * jnp.einsum("ijk,jc,kc->ic", ds, k1, k2),
    scale * jnp.einsum("ijk,ic,kc->jc", ds, q, k2),
    scale * jnp.einsum("ijk,ic,jc->kc", ds, q, k1),
    jnp.einsum("ijk,ic,kc->jc", p, c, v2),
    jnp.einsum("ijk,ic,jc->kc", p, c, v1),
  )
  assert relative([x[0, :, 0] for x in got], want) < 1e-12


@pytest.mark.parametrize(("degree", "bound"), [(2, 1.4), (6, 1.0)])
def test_gradients_of_the_polynomial(degree, bound):
  n, d = 24, 4
  arrays = one_head(3, n, d, bound)
  (d_out,) = uniform(6, (1, n, 1, d))
  radius = float(tensor_logit_radius(*arrays[:3]))

  def pull(fn):
    return quick_jit(functools.partial(value_and_vjp, fn))(d_out, *arrays)[1]

  exact = pull(dense_pair)
  eps = polynomial_error(polynomial_coefficients(degree, radius), radius)
  ours = functools.partial(
    polynomial_tensor_attention, degree=degree, radius=radius, chunk_size=7
  )
  kernel = polynomial(degree, radius)
  surrogate = pull(ours)
  want = pull(functools.partial(dense_pair, kernel=kernel))
  assert relative(surrogate, want) < 1e-11
  assert relative(surrogate, exact) <= 30 * eps
  closed = pull(functools.partial(ours, backward="closed_form"))
  assert eps / 1000 < relative(closed, exact) <= 5 * eps
  assert relative(closed, exact) < relative(surrogate, exact)
  if degree > 2:
    return
  causal = functools.partial(ours, is_causal=True)
  want = functools.partial(dense_pair, kernel=kernel, is_causal=True)
  assert relative(pull(causal), pull(want)) < 1e-11


# --- symmetries ---


@pytest.mark.parametrize("degree", [None, 4])
def test_symmetries(degree):
  attend = tensor_attention
  if degree is not None:
    attend = functools.partial(
      polynomial_tensor_attention, degree=degree, radius=1.0
    )
  q, k1, k2, v1, v2 = one_head(4, 20, 3)
  out = attend(q, k1, k2, v1, v2)
  order = np.random.default_rng(0).permutation(20)
  k0, v0, k3, v3 = (x[:, order] for x in (k1, v1, k2, v2))
  for changed in (
    (k2, k1, v2, v1),
    (k0, k2, v0, v2),
    (k1, k3, v1, v3),
    (k3, k0, v3, v0),
  ):
    np.testing.assert_allclose(attend(q, *changed), out, atol=1e-14)
  causal = functools.partial(attend, is_causal=True)
  np.testing.assert_allclose(
    causal(q, k2, k1, v2, v1), causal(q, k1, k2, v1, v2), atol=1e-14
  )
  # Weights sum to one, whatever they are; to a rounding, as columns of a matrix
  # product need not be summed in one order.
  ones = jnp.ones_like(v1)
  np.testing.assert_allclose(attend(q, k1, k2, ones, ones), 1, atol=1e-15)


# --- memory ---


@pytest.mark.parametrize("is_causal", [False, True])
def test_polynomial_memory(is_causal):
  n, m = 4096, 45
  x = jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32)
  attend = functools.partial(
    polynomial_tensor_attention, degree=2, radius=1.0, is_causal=is_causal
  )
  pull = functools.partial(value_and_vjp, attend)
  assert max(array_sizes(pull, *[x] * 6)) < n * m


@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_memory(is_causal):
  n = 2048
  x = jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32)
  attend = functools.partial(
    tensor_attention, is_causal=is_causal, chunk_size=4
  )
  pull = functools.partial(value_and_vjp, attend)
  assert max(array_sizes(pull, *[x] * 6)) < n * n / 2


def test_long_sequences_run():
  n, d = 32768, 8
  arrays = [x.astype("float32") for x in one_head(0, n, d)[:3]]
  # Values that go with keys: means of others would be close to 0.
  arrays += arrays[1:]
  coefs = polynomial_coefficients(2, 1.0)
  weights = np.repeat(coefs, (1, d, d * d))

  def features(x):
    square = (x[:, :, None] * x[:, None]).reshape(len(x), -1)
    return np.concatenate((np.ones((len(x), 1)), x, square), 1)

  def want(queries, last):
    q, *kv = (np.asarray(x, float)[0, :, 0] for x in arrays)
    k1, k2, v1, v2 = (x[:last] for x in kv)
    sums = [
      features(k).T @ np.c_[v, np.ones(last)] for k, v in ((k1, v1), (k2, v2))
    ]
    phi = features(q[queries] / np.sqrt(d))
    total = phi @ (weights[:, None] * sums[0] * sums[1])
    return total[:, :-1] / total[:, -1:]

  attend = functools.partial(
    polynomial_tensor_attention, *arrays, degree=2, radius=1.0
  )
  out = np.asarray(attend())[0, :, 0]
  rows = [0, 1000, 20000, n - 1]
  np.testing.assert_allclose(out[rows], want(rows, n), rtol=0, atol=1e-5)
  assert np.ptp(out[rows], 0).min() > 1e-3
  out = np.asarray(attend(is_causal=True))[0, :, 0]
  for t in rows:
    np.testing.assert_allclose(out[t], want([t], t + 1)[0], rtol=0, atol=1e-5)


# --- streams ---


def test_moments_decode_what_causal_attention_computes():
  n, d, hv = 10, 3, 2
  q, k1, k2 = uniform(0, (2, n, 4, d), (2, n, 2, d), (2, n, 2, d))
  v1, v2 = uniform(1, (2, n, 2, hv), (2, n, 2, hv))
  options = {"radius": 1.0, "scale": 0.3, "coefficients": "taylor"}
  want = polynomial_tensor_attention(
    q, k1, k2, v1, v2, degree=4, is_causal=True, **options
  )
  state1 = state2 = moment_init(2, 2, d, hv, degree=4, dtype="float64")
  for t in range(n):
    now = slice(t, t + 1)
    state1 = moment_update(state1, k1[:, now], v1[:, now])
    state2 = moment_update(state2, k2[:, now], v2[:, now])
    out, info = tensor_moment_query(
      state1, state2, q[:, now], return_info=True, **options
    )
    np.testing.assert_allclose(out, want[:, now], atol=1e-13)
  norms = [jnp.linalg.norm(x, axis=-1) for x in (q[:, -1:], k1, k2)]
  largest = [jnp.repeat(x.max(1), 2, 1)[:, None] for x in norms[1:]]
  used = 0.3 * norms[0] * largest[0] * largest[1]
  np.testing.assert_allclose(info.radius_used, used, rtol=1e-12)


def test_refused_states():
  states = [moment_init(1, 2, 3, 2, degree=g) for g in (2, 4)]
  query = jnp.ones((1, 1, 2, 3))
  with pytest.raises(ValueError, match="must have one degree, got 2 and 4"):
    tensor_moment_query(*states, query, radius=1.0)
  other = moment_init(1, 2, 3, 5, degree=2)
  with pytest.raises(
    ValueError, match=r"state2.moments must have shape \(1, 2"
  ):
    tensor_moment_query(states[0], other, query, radius=1.0)
  full = moment_update(states[0], query, query[..., :2])
  for pair, name in (
    ((states[0], full), "state1"),
    ((full, states[0]), "state2"),
  ):
    message = f"{name} must hold tokens, got one without any update"
    with pytest.raises(ValueError, match=message):
      tensor_moment_query(*pair, query, radius=1.0)


def test_an_element_without_tokens_of_one_stream_gets_0():
  x = jnp.ones((2, 3, 2, 3))
  empty = moment_init(2, 2, 3, 3, degree=2, dtype="float64")
  full = moment_update(empty, x, x)
  hidden = np.array([[False] * 3, [True] * 3])
  part = moment_update(empty, x, x, key_mask=hidden)
  for states in ((full, part), (part, full)):
    out = tensor_moment_query(*states, x, radius=9.0)
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_allclose(out[1], 1, rtol=1e-14)


# --- kernels ---


@pytest.mark.parametrize("is_causal", [False, True])
def test_interpreted_kernels_equal_the_blocks_in_xla(is_causal):
  # All gradients, of the scale too.
  q, *keys = uniform(0, (2, 5, 4, 3), *[(2, 5, 2, 3)] * 2)
  values = uniform(1, *[(2, 5, 2, 2)] * 2)
  masks = np.arange(5) != np.array([[1], [3]]), None

  def loss(implementation, scale, *arrays):
    out = tensor_attention(
      *arrays,
      scale=scale,
      is_causal=is_causal,
      key_mask1=masks[0],
      key_mask2=masks[1],
      chunk_size=2,
      implementation=implementation,
    )
    return (out**2).sum()

  got, want, plain = (
    quick_jit(
      jax.value_and_grad(functools.partial(loss, name), tuple(range(6)))
    )(0.7, q, *keys, *values)
    for name in ("pallas_interpret", None, "xla")
  )
  assert relative(got, want) < 1e-12
  assert relative(plain, want) < 1e-14


def test_second_derivatives_of_kernels():
  arrays = one_head(3, 4, 2)

  def curvature(attend):
    def slope(*arrays):
      gradient = jax.grad(lambda *x: (attend(*x) ** 3).sum(), tuple(range(5)))
      return sum(jnp.sin(x).sum() for x in gradient(*arrays))

    return quick_jit(jax.grad(slope, tuple(range(5))))(*arrays)

  attend = functools.partial(
    tensor_attention, implementation="pallas_interpret"
  )
  assert relative(curvature(attend), curvature(dense_pair)) < 1e-11


@pytest.mark.any_x64
@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_a_tpu_takes_the_kernels(implementation):
  def loss(*arrays):
    return tensor_attention(*arrays, implementation=implementation).sum()

  shapes = [jax.ShapeDtypeStruct((1, 30, 2, 8), jnp.float32)] * 5
  traced = jax.jit(jax.grad(loss, tuple(range(5)))).trace(*shapes)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  # Forward, and all gradients.
  assert text.count("@tpu_custom_call") == 2


def test_kernels_are_refused_where_they_cannot_run():
  x = jnp.ones((1, 4, 2, 8))
  for dtype, options, message in (
    ("float32", {}, "it needs a TPU; 'xla' and"),
    ("float64", {}, "takes float32 or bfloat16, got float64"),
    ("float32", {"chunk_size": 5}, "block_q must be a multiple of 128 on a TP"),
  ):
    with pytest.raises(NotImplementedError, match=message):
      tensor_attention(
        *[x.astype(dtype)] * 5, implementation="pallas", **options
      )


# --- refused input ---

_GOOD = {
  "query": (2, 3, 4, 5),
  "key1": (2, 6, 2, 5),
  "key2": (2, 7, 2, 5),
  "value1": (2, 6, 2, 3),
  "value2": (2, 7, 2, 3),
}
_BAD_SHAPES = [
  ("key2", (2, 7, 2, 4), "key2 must have shape (2, *, *, 5) = (B, S, K, H), g"),
  ("value2", (2, 6, 2, 3), "value2 must have shape (2, 7, 2, *) = (B, S, K, H"),
  ("value2", (2, 7, 2, 4), "value2 must have shape (2, *, 2, 3) = (..., K, Hv"),
  ("query", (2, 3, 3, 5), "the 2 heads of key1 and value1 must divide the 3 h"),
]
_BAD_OPTIONS = [
  ({"is_causal": True}, "is_causal needs key1, key2 and query of one length, "
   "got T=3, S1=6, S2=7"),
  ({"key_mask2": np.ones((2, 6), bool)}, "key_mask2 must have shape (2, 7)"),
  ({"key_mask1": np.ones((2, 6))}, "key_mask1 must be boolean (True = attend)"),
]  # fmt: skip
_BAD_POLYNOMIALS = [
  ({"degree": 3}, "degree must be even, got 3"),
  ({"degree": -2}, "degree must be >= 0, got -2"),
  ({"degree": 60}, "feature dimension C(5+60,60)=8259888 too large; lower de"),
  ({"radius": 0.0}, "radius must be positive and finite, got 0.0"),
  ({"coefficients": "gaussian"}, "coefficients must be one of 'minimax', 'tay"),
  ({"mask": np.ones((3, 6, 7), bool)}, "mask must be None, got shape (3, 6, 7"),
  ({"bias": np.ones((3, 6, 7))}, "bias must be None, got shape (3, 6, 7)"),
]  # fmt: skip


@pytest.mark.parametrize("attend", ["exact", "polynomial", "radius"])
def test_refused_shapes(attend):
  fn = {
    "exact": tensor_attention,
    "polynomial": functools.partial(
      polynomial_tensor_attention, degree=2, radius=1.0
    ),
    "radius": lambda q, k1, k2, v1, v2: tensor_logit_radius(q, k1, k2),
  }[attend]
  for name, shape, message in _BAD_SHAPES:
    if attend == "radius" and "value" in name:
      continue
    if attend == "radius":
      message = message.replace("value1", "key1")
    arrays = (jnp.ones(x) for x in (_GOOD | {name: shape}).values())
    with pytest.raises(ValueError, match=re.escape(message)):
      fn(*arrays)


def test_refused_options():
  arrays = [jnp.ones(x) for x in _GOOD.values()]
  options = {"degree": 2, "radius": 1.0}
  for bad, message in _BAD_OPTIONS:
    for fn in (
      tensor_attention,
      functools.partial(polynomial_tensor_attention, **options),
    ):
      with pytest.raises(ValueError, match=re.escape(message)):
        fn(*arrays, **bad)
  for bad, message in _BAD_POLYNOMIALS:
    with pytest.raises(ValueError, match=re.escape(message)):
      polynomial_tensor_attention(*arrays, **(options | bad))
  square = [jnp.ones((2, 3, 2, 5))] * 5
  message = "backward must be 'surrogate' with is_causal=True, got 'closed_fo"
  with pytest.raises(ValueError, match=message):
    polynomial_tensor_attention(
      *square, is_causal=True, backward="closed_form", **options
    )


def test_exact_refuses_what_takes_hours():
  x = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
  message = (
    "exact tensor attention would need 68719476736 scores a head; use "
    "polynomial_tensor_attention"
  )
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(tensor_attention, *[x] * 5)
  message = (
    "tensor_logit_radius would go through 68719476736 logits a head; scale "
    "times the largest 3-norms of query, key1 and key2 bounds them"
  )
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(tensor_logit_radius, *[x] * 3)
  # As many as are still gone through, and a token more.
  long, short = (jax.ShapeDtypeStruct((1, n, 1, 8), "f4") for n in (2049, 2048))
  jax.eval_shape(tensor_logit_radius, x, short, short)
  with pytest.raises(ValueError, match="would go through 17188257792 logits"):
    jax.eval_shape(tensor_logit_radius, x, short, long)


def test_refused_tuples():
  x = jnp.ones((1, 4, 2, 3))
  attend = functools.partial(polynomial_order_attention, degree=2, radius=1.0)
  for keys, values, message in (
    ((), (), "keys must be a tuple of arrays, got ()"),
    ((x,), (), "values must be a tuple of arrays, got ()"),
    (x, (x,), "keys must be a tuple of arrays, got Array("),
    ((x, x), (x, x, x), "keys and values must be tuples of one length, g"),
    ((x, x[..., :2]), (x, x), "keys[1] must have shape (1, *, *, 3) = (B, S"),
    ((x, x), (x, x[:, :3]), "values[1] must have shape (1, 4, 2, *) = (B, S"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
      attend(x, keys, values)
  message = "keys and key_masks must be tuples of one length, got 1 and 2"
  with pytest.raises(ValueError, match=message):
    attend(x, (x,), (x,), key_masks=(None, None))
  message = "key_masks must be a tuple or None, got [None]"
  with pytest.raises(ValueError, match=re.escape(message)):
    attend(x, (x,), (x,), key_masks=[None])
  short = x[:, :3]
  message = "is_causal needs keys[0], keys[1] and query of one length, got T=4"
  with pytest.raises(ValueError, match=re.escape(message)):
    attend(x, (x, short), (x, short), is_causal=True)
