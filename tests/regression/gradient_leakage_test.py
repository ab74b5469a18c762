"""What gradients tell without a search: labels, ranks, spans, closed forms."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models.leakage import LeakageBlock
from jaxattn.regression import gradient_leakage
from tests.regression import _leakage

_KEYS = ("w_q", "w_k", "w_v")


def _several(count, block):
  """Tables, parameters, tokens and gradients of several seeds, stacked."""
  drawn = [_leakage.arrays(seed=seed) for seed in range(count)]
  embed, params = jax.tree.map(lambda *x: jnp.stack(x), *drawn)
  ids = np.stack([_leakage.token_ids(seed=5 + s) for s in range(count)])
  labels = jnp.arange(count) % 5
  x = jnp.take_along_axis(embed, ids[..., None], 1)
  leaked = jax.jit(jax.vmap(jax.grad(block.loss)))(params, x, labels)
  return embed, params, ids, labels, leaked


def _rank(matrix, tol=1e-10):
  s = np.linalg.svd(matrix, compute_uv=False)
  return int((s > tol * s[0]).sum())


# --- labels ---


def test_label_is_the_only_negative_entry():
  _, _, _, labels, leaked = _several(20, LeakageBlock())
  bias = np.asarray(leaked["b_c"])
  assert ((bias < 0).sum(1) == 1).all()
  got = jax.vmap(gradient_leakage.label_from_bias)(leaked["b_c"])
  np.testing.assert_array_equal(got, labels)


# --- ranks ---


def test_ranks_of_the_gradients_of_attention():
  *_, leaked = _leakage.reference()
  assert [_rank(leaked[k]) for k in _KEYS] == [7, 7, 8]
  assert _rank(gradient_leakage.closed_form.stack_columns(leaked, _KEYS)) == 8


@functools.cache
def _report(n, pooling, mlp, leaves):
  """The instance of the table of ranks."""
  _, params = _leakage.arrays(n=n, d=8, mlp=16, num_classes=4)
  params = params if mlp else _leakage.without_mlp(params)
  x = jnp.asarray(0.7 * np.random.default_rng(1).normal(size=(n, 8)))
  seen = {k: k != "pos" and (leaves is None or k in leaves) for k in params}
  block = LeakageBlock(pooling=pooling, mlp=16 * mlp, num_classes=4)
  return gradient_leakage.leak_report(
    block.loss, params, x, 1, mask_leaves=seen
  )


@pytest.mark.parametrize(
  ("n", "pooling", "mlp", "leaves", "rank"),
  [
    (4, "cls", True, None, 24),
    (32, "cls", True, None, 24),
    (4, "mean", True, None, 32),
    (32, "mean", True, None, 256),
    (16, "mean", False, None, 80),
    (32, "mean", True, ("w_q", "w_k", "w_v", "w_o"), 128),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (8, "cls", True, None, 24),
        (16, "cls", True, None, 24),
        (8, "mean", True, None, 64),
        (16, "mean", True, None, 128),
        (32, "mean", False, None, 80),
      )
    ),
  ],
)
def test_rank_of_the_jacobian(n, pooling, mlp, leaves, rank):
  report = _report(n, pooling, mlp, leaves)
  assert report.rank == rank
  assert report.unknowns == 8 * n
  assert bool(report.full_rank) == (rank == 8 * n)
  assert report.pos_rank == -1
  if mlp and leaves is None:
    assert report.equations == 564
    assert report.span_rank == (min(n, 8) if pooling == "mean" else 3)


def test_jacobian_is_the_one_of_differences():
  embed, params, ids, block, _ = _leakage.reference()
  x = embed[ids]
  report = gradient_leakage.leak_report(block.loss, params, x, _leakage.LABEL)
  gradient = jax.jit(jax.grad(block.loss))

  def flat(x):
    leaves = jax.tree.leaves(gradient(params, x, _leakage.LABEL))
    return np.concatenate([np.ravel(g) for g in leaves])

  h, columns = 1e-5, []
  for i in range(x.size):
    step = jnp.zeros(x.size).at[i].set(h).reshape(x.shape)
    columns.append((flat(x + step) - flat(x - step)) / (2 * h))
  s = np.linalg.svd(np.stack(columns, 1), compute_uv=False)
  assert (report.equations, report.unknowns) == (2293, 128)
  assert (report.rank, report.pos_rank, report.span_rank) == (128, 8, 8)
  np.testing.assert_allclose(report.condition, s[0] / s[-1], rtol=1e-5)
  assert 200 < report.condition < 320


def test_pos_sees_three_numbers_of_the_first_token():
  embed, params, ids, _, _ = _leakage.reference()
  block = LeakageBlock(pooling="cls")
  report = gradient_leakage.leak_report(block.loss, params, embed[ids], 2)
  assert (report.pos_rank, report.span_rank) == (3, 3)


def test_fewer_equations_than_unknowns():
  _, params = _leakage.arrays(n=4, d=8, mlp=16, num_classes=4)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8)))
  report = gradient_leakage.leak_report(
    LeakageBlock(mlp=16, num_classes=4).loss,
    params,
    x,
    1,
    mask_leaves={k: k == "b_1" for k in params},
  )
  assert (report.equations, report.unknowns) == (16, 32)
  assert report.condition == np.inf
  assert not report.full_rank


# --- the span ---


@pytest.mark.parametrize(
  ("pooling", "low", "high"), [("mean", 1.0, 1.0), ("cls", 0.0, 0.25)]
)
def test_tokens_are_read_off_the_span(pooling, low, high):
  block = LeakageBlock(pooling=pooling)
  embed, params, ids, _, leaked = _several(5, block)
  found = jax.jit(jax.vmap(gradient_leakage.span_attack))(
    leaked, embed, params["pos"]
  )
  accuracy = (np.asarray(found.ids) == ids).mean(1)
  assert ((low <= accuracy) & (accuracy <= high)).all()
  assert (found.rank == (8 if pooling == "mean" else 3)).all()
  if pooling == "mean":
    nearest = np.sort(found.distances, 2)
    assert nearest[..., 0].max() < 1e-6
    assert nearest[..., 1].min() > 0.1


def test_all_three_gradients_are_needed():
  embed, params, ids, _, leaked = _leakage.reference()
  attack = functools.partial(
    gradient_leakage.span_attack, leaked, embed, params["pos"]
  )
  alone = attack(w_keys=["w_q"])
  assert alone.rank == 7
  assert alone.distances[np.arange(8), ids].max() > 1e-4
  assert attack().distances[np.arange(8), ids].max() < 1e-6


def test_distances_are_those_of_projections():
  embed, params, _, _, leaked = _leakage.reference()
  pos = params["pos"]
  gradient = np.concatenate([leaked[k] for k in _KEYS], 1)
  u = np.linalg.svd(gradient)[0][:, :8]
  tokens = np.asarray(embed)[None] + np.asarray(pos)[:, None]
  rest = tokens - tokens @ u @ u.T
  want = np.linalg.norm(rest, axis=-1) / np.linalg.norm(tokens, axis=-1)
  got = gradient_leakage.span_attack(leaked, embed, pos).distances
  np.testing.assert_allclose(got, want, atol=1e-7)
  same = gradient_leakage.span_attack(
    leaked, embed, pos, token_fn=lambda x: 2 * x
  )
  np.testing.assert_allclose(same.distances, want, atol=1e-12)


def test_span_behind_a_layer_norm():
  embed, params, ids, block, _ = _leakage.reference()

  def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  def loss(params, x, y):
    z = norm(x + params["pos"])
    return block.loss(params | {"pos": jnp.zeros_like(z)}, z, y)

  leaked = jax.jit(jax.grad(loss))(params, embed[ids], 1)
  attack = functools.partial(
    gradient_leakage.span_attack, leaked, embed, params["pos"]
  )
  found = attack(token_fn=norm)
  np.testing.assert_array_equal(found.ids, ids)
  assert found.distances.min(1).max() < 1e-12
  assert attack().distances.min() > 1e-3


def test_span_in_single_precision():
  embed, params, ids, block, _ = _leakage.reference()
  embed, params = jax.tree.map(lambda x: x.astype(jnp.float32), (embed, params))
  leaked = jax.jit(jax.grad(block.loss))(params, embed[ids], 2)
  found = gradient_leakage.span_attack(leaked, embed, params["pos"])
  assert found.distances.dtype == jnp.float32
  assert found.rank == 8
  np.testing.assert_array_equal(found.ids, ids)


# --- APRIL ---


def test_april_is_exact_without_a_residual():
  embed, params, ids, _, _ = _leakage.reference()
  block = LeakageBlock(residual=False)
  leaked = jax.jit(jax.grad(block.loss))(params, embed[ids], _leakage.LABEL)
  found = gradient_leakage.april_attack(params, leaked)
  assert _leakage.relative_error(found, embed[ids]) <= 1e-10


def test_april_refuses_a_residual():
  _, params, _, _, leaked = _leakage.reference()
  with pytest.raises(
    ValueError, match="april_attack requires a block without residual"
  ):
    gradient_leakage.april_attack(params, leaked)


def test_april_refuses_the_first_token_alone():
  embed, params, ids, _, _ = _leakage.reference()
  block = LeakageBlock(residual=False, pooling="cls")
  leaked = jax.jit(jax.grad(block.loss))(params, embed[ids], _leakage.LABEL)
  with pytest.raises(
    ValueError, match="needs a gradient in pos of rank n=8, got rank 3"
  ):
    gradient_leakage.april_attack(params, leaked)


# --- losses ---


def test_matching_losses():
  rng = np.random.default_rng(0)
  shapes = {"a": (2, 3), "b": (4,)}
  g, w = ({k: rng.normal(size=s) for k, s in shapes.items()} for _ in "gw")
  flat = [np.concatenate([t["a"].ravel(), t["b"]]) for t in (g, w)]
  size = np.linalg.norm(flat[1])
  square = ((flat[0] - flat[1]) ** 2).sum() / size**2
  tag = square + 0.1 / size * (
    np.abs(g["a"] - w["a"]).sum() + np.abs(g["b"] - w["b"]).sum() / 2
  )
  cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / size
  for kind, want in (
    ("euclidean", square / 2),
    ("tag", tag / 2),
    ("cosine", 1 - cosine),
  ):
    loss = gradient_leakage.gradient_matching_loss(kind)
    np.testing.assert_allclose(loss(g, w), want, rtol=1e-12)
    assert loss is gradient_leakage.gradient_matching_loss(kind)
  # By depth, not by name: the positions come first and the logits last.
  names = {"a": "w_c", "b": "pos"}
  g, w = ({names[k]: x for k, x in tree.items()} for tree in (g, w))
  tag = square + 0.1 / size * (
    np.abs(g["pos"] - w["pos"]).sum() + np.abs(g["w_c"] - w["w_c"]).sum() / 2
  )
  loss = gradient_leakage.gradient_matching_loss("tag")
  np.testing.assert_allclose(loss(g, w), tag / 2, rtol=1e-12)
  # Of two settings of one gradient only the direction matters to a cosine.
  twice = jax.tree.map(lambda x: 2 * x, g)
  assert gradient_leakage.gradient_matching_loss("cosine")(twice, g) < 1e-12


# --- refusals ---


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda g: gradient_leakage.span_attack(
        {"w_v": np.ones((16, 4))},
        np.ones((9, 16)),
        np.ones((16, 16)),
        w_keys=["w_v"],
      ),
      "span_attack needs n <= d-1, got n=16, d=16",
    ),
    (
      lambda g: gradient_leakage.span_attack(
        g, np.ones((9, 16)), np.ones((4, 12))
      ),
      "pos must have shape (*, 16) = (n, d), got (4, 12)",
    ),
    (
      lambda g: gradient_leakage.span_attack(
        {"w_q": g["w_q"]}, np.ones((9, 16)), np.ones((4, 16))
      ),
      "leaked must have 'w_q', 'w_k', 'w_v', got ['w_q'] without 'w_k', 'w_v'",
    ),
    (
      lambda g: gradient_leakage.span_attack(
        g, np.ones((9, 12)), np.ones((4, 12))
      ),
      "leaked must have shape (12, *) = (d, ...), got (16, 48)",
    ),
    (
      lambda g: gradient_leakage.span_attack(
        g, np.ones((9, 16)), np.ones((4, 16)), tol=0.0
      ),
      "tol must be in (0.0, 1.0), got 0.0",
    ),
    (
      lambda g: gradient_leakage.april_attack({"w_q": 1}, g),
      "params must have 'w_q', 'w_k', 'w_v', 'pos', got ['w_q'] without",
    ),
    (
      lambda g: gradient_leakage.april_attack(
        g | {"pos": np.ones((16, 16))}, g
      ),
      "april_attack needs n <= d-1, got n=16, d=16",
    ),
    (
      lambda g: gradient_leakage.gradient_matching_loss("x"),
      "kind must be one of 'euclidean', 'cosine', 'tag', got 'x'",
    ),
    (
      lambda g: gradient_leakage.label_from_bias(np.ones((2, 2))),
      "grad_bias must have 1 dimensions, got shape (2, 2)",
    ),
    (
      lambda g: gradient_leakage.leak_report(
        LeakageBlock().loss, g, np.ones(3), 1
      ),
      "embeddings must have 2 or 3 dimensions, got shape (3,)",
    ),
  ],
)
def test_refusals(call, message):
  *_, leaked = _leakage.reference()
  with pytest.raises(ValueError, match=re.escape(message)):
    call(leaked)
