"""The in-context regressor: what its weights and its mask do, and training."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models import icl
from jaxattn.regression.reweighted_icl import Prompt

_MODEL = icl.ICLRegressor(width=8, num_layers=2, num_heads=2)


def _inputs(seed=0, m=5, num_queries=3, d=2):
  rng = np.random.default_rng(seed)
  x, y = rng.normal(size=(m, d)), rng.normal(size=m)
  prompt = Prompt(jnp.asarray(x), jnp.asarray(y))
  return prompt, jnp.asarray(rng.normal(size=(num_queries, d)))


def _params():
  params = icl.init_icl(jax.random.key(0), _MODEL, 2)
  # Biases away from 0, so that each counts.
  return jax.tree.map(lambda x: x.astype(jnp.float64) + 0.01, params)


def _reference(params, prompt, query, w, mode):
  """The same, one query at a time, as it is written down."""
  p = jax.tree.map(np.asarray, params["params"])
  x, y, w = (np.asarray(z) for z in (*prompt, w))
  m = len(y)

  def layer(z, own, p):
    def head(name):
      return np.einsum("td,dnh->tnh", z, p[name]["kernel"]) + p[name]["bias"]

    q, k, v = head("query"), head("key"), head("value")
    out = np.zeros_like(q)
    for t in range(len(z)):
      keys = [*range(m), t] if t >= m else list(range(m))
      for n in range(q.shape[1]):
        logits = k[keys, n] @ q[t, n] / q.shape[2] ** 0.5
        if mode == "logit":
          logits[:m] += np.log(own)
        e = np.exp(logits - logits.max())
        values = v[keys, n].copy()
        if mode == "value":
          values[:m] *= own[:, None]
        out[t, n] = e @ values / e.sum()
    z = z + np.einsum("tnh,nhd->td", out, p["out"]["kernel"]) + p["out"]["bias"]
    mean, var = z.mean(1, keepdims=True), z.var(1, keepdims=True)
    h = (z - mean) / np.sqrt(var + 1e-6) * p["norm"]["scale"]
    h = (h + p["norm"]["bias"]) @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
    h = np.asarray(jax.nn.gelu(h))
    return z + h @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]

  answers = []
  for q in np.asarray(query):
    tokens = np.concatenate([x, y[:, None], np.ones((m, 1))], 1)
    tokens = np.concatenate([tokens, np.append(q, [0, 0])[None]])
    z = tokens @ p["embed"]["kernel"]
    if mode == "embedding":
      z[:m] *= w[:, None]
    for i in range(2):
      z = layer(z, w, p[f"layer_{i}"])
    answers.append(z[-1] @ p["head"]["kernel"] + p["head"]["bias"])
  return np.concatenate(answers)


@pytest.mark.parametrize("mode", ["embedding", "logit", "value"])
def test_is_what_is_written_down(mode):
  prompt, query = _inputs()
  params, w = _params(), jnp.array([0.5, 1.5, 1.0, 0.1, 2.0])
  got = _MODEL.apply(params, prompt, query, w, mode)
  want = _reference(params, prompt, query, w, mode)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_order_of_examples_does_not_matter():
  prompt, query = _inputs()
  order = np.array([3, 0, 4, 1, 2])
  mixed = Prompt(prompt.x[order], prompt.y[order])
  np.testing.assert_allclose(
    _MODEL.apply(_params(), prompt, query),
    _MODEL.apply(_params(), mixed, query),
    rtol=0,
    atol=1e-13,
  )


@pytest.mark.parametrize("mode", ["embedding", "logit", "value"])
def test_a_prefix_stands_in_front_of_the_tokens(mode):
  prompt, query = _inputs()
  params, w = _params(), jnp.array([0.5, 1.5, 1.0, 0.1, 2.0])

  def predict(prompt, w, tokens=None):
    prefix = {} if tokens is None else {"prefix": {"tokens": tokens}}
    return _MODEL.apply({**params, **prefix}, prompt, query, w, mode)

  # That of an example is the example, shown with a weight of 1.
  extra = Prompt(jnp.array([[0.3, -2.0]]), jnp.array([1.4]))
  token = jnp.array([[0.3, -2.0, 1.4, 1.0]])
  vectors = token @ params["params"]["embed"]["kernel"]
  longer = Prompt(*(jnp.concatenate(z) for z in zip(extra, prompt)))
  np.testing.assert_allclose(
    predict(prompt, w, vectors),
    predict(longer, jnp.append(1.0, w)),
    rtol=0,
    atol=1e-12,
  )
  np.testing.assert_array_equal(
    predict(prompt, w, vectors[:0]), predict(prompt, w)
  )
  message = "params['prefix']['tokens'] must have shape (*, 8) = (P, width)"
  with pytest.raises(ValueError, match=re.escape(message)):
    predict(prompt, w, vectors[:, :7])


def test_training_learns_to_regress():
  # One dimension is enough: the mean label's error is 1, and a fit's 0.
  _, history = icl.train_icl(
    jax.random.key(1),
    dim=1,
    num_examples=8,
    num_steps=400,
    model=icl.ICLRegressor(width=16, num_layers=1),
  )
  assert history.losses[-20:].mean() < 0.1


def test_training():
  params, history = icl.train_icl(
    jax.random.key(0), dim=2, num_examples=6, num_steps=60, model=_MODEL
  )
  # The labels' variance is 2; a start at 0 would be there.
  assert history.losses.shape == (60,)
  assert history.losses[-10:].mean() < 0.8 * history.losses[:3].mean()
  got = icl.icl_loss(
    params, jax.random.key(1), model=_MODEL, dim=2, num_examples=6
  )
  assert got < 0.85 * history.losses[:3].mean()


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: icl.ICLRegressor(width=7).init(jax.random.key(0), *_inputs()),
      "num_heads must divide width=7, got 2",
    ),
    (
      lambda: _MODEL.apply(_params(), *_inputs(), jnp.ones(5), "x"),
      "mode must be one of 'embedding', 'logit', 'value', got 'x'",
    ),
    (
      lambda: _MODEL.apply(_params(), *_inputs(), jnp.ones(4)),
      "w must have shape (5,) = (m,), got (4,)",
    ),
    (
      lambda: _MODEL.apply(_params(), _inputs()[0], jnp.ones((2, 3))),
      "query must have shape (*, 2) = (Q, d), got (2, 3)",
    ),
    (
      lambda: icl.train_icl(jax.random.key(0), dim=0),
      "dim must be >= 1, got 0",
    ),
    (
      lambda: icl.train_icl(jax.random.key(0), dim=2, num_steps=0),
      "num_steps must be >= 1, got 0",
    ),
  ],
)
def test_refused(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
