"""Bags of digits: a label for a set of images, of which one matters."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxattn import data
from jaxattn.models import HopfieldLayer, HopfieldPooling

POOLINGS = ("mean", "wide-mean", "attention", "hopfield", "three-steps")

# A ConfigDict: what type a field has is known at run time only.
Config = Any


class BagClassifier(nn.Module):
  """Embeds the elements of a bag, pools them, and gives one logit.

  Attributes:
    pooling: "mean", or "wide-mean"; "attention", weights from a network of one
      hidden layer; "hopfield", one step, or "three-steps".
    dim: of the embedding.
    head_dim: of the two kinds that attend.
  """

  pooling: str
  dim: int
  head_dim: int

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Classifies (B, S, F) bags; ``mask`` (B, S) hides what is none."""
    x = nn.relu(nn.Dense(self.dim)(x))
    if self.pooling in ("hopfield", "three-steps"):
      steps = 1 if self.pooling == "hopfield" else 3
      layer = HopfieldLayer(head_dim=self.head_dim, max_steps=steps)
      pooled = HopfieldPooling(layer=layer)(x, key_mask=mask)[:, 0]
    else:
      scores = jnp.zeros(mask.shape, x.dtype)
      if self.pooling == "attention":
        hidden = jnp.tanh(nn.Dense(self.head_dim)(x))
        scores = nn.Dense(1)(hidden)[..., 0]
      weights = jax.nn.softmax(scores, where=mask)
      pooled = jnp.einsum("bs,bsf->bf", weights, x)
    return nn.Dense(1)(pooled)[..., 0]


def bags_point(config: Config, pooling: str) -> dict[str, Any]:
  """(seeds,) shares of bags of unseen digits that are labeled right."""
  pixels, labels = data.load_digits()
  order = np.random.default_rng(config.seed).permutation(len(labels))
  pixels, hits = pixels[order] / 16, labels[order] == config.digit
  train, test = (
    (pixels[half][~hits[half]], pixels[half][hits[half]])
    for half in (slice(config.num_train), slice(config.num_train, None))
  )
  dim = config.bag_wide_dim if pooling == "wide-mean" else config.bag_dim
  model = BagClassifier(pooling, dim, config.bag_head_dim)
  rngs = jax.random.split(jax.random.key(config.seed), config.bag_seeds)
  run = jax.vmap(functools.partial(_train, model, config, train, test))
  accuracy, params = jax.jit(run)(rngs)
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  return {"accuracy": np.asarray(accuracy), "num_params": size // len(rngs)}


def sample_bags(
  rng: jax.Array,
  misses: Any,
  hits: Any,
  *,
  batch_size: int,
  sizes: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Bags (B, S, F), masks (B, S) and labels (B,): half hold one hit.

  Args:
    rng: key.
    misses: (n, F) elements of any bag.
    hits: (m, F) elements of which those labeled True hold one, the first;
      nothing that pools looks at the order.
    batch_size: B.
    sizes: least and largest number of elements; the latter is S.
  """
  rng_size, rng_label, rng_miss, rng_hit = jax.random.split(rng, 4)
  low, high = sizes
  size = jax.random.randint(rng_size, (batch_size, 1), low, high + 1)
  label = jax.random.bernoulli(rng_label, shape=(batch_size,))
  index = jax.random.randint(rng_miss, (batch_size, high), 0, len(misses))
  x = jnp.asarray(misses)[index]
  index = jax.random.randint(rng_hit, (batch_size,), 0, len(hits))
  hit = jnp.asarray(hits)[index]
  x = x.at[:, 0].set(jnp.where(label[:, None], hit, x[:, 0]))
  return x, jnp.arange(high)[None] < size, label


def _train(
  model: BagClassifier,
  config: Config,
  train: tuple[np.ndarray, np.ndarray],
  test: tuple[np.ndarray, np.ndarray],
  rng: jax.Array,
) -> tuple[jax.Array, Any]:
  """Accuracy after training, and the parameters."""
  rng_init, rng_train, rng_test = jax.random.split(rng, 3)
  sizes = tuple(config.bag_sizes)
  batch = functools.partial(sample_bags, sizes=sizes)
  optimizer = optax.adam(config.bag_rate)

  def loss(params: Any, rng: jax.Array) -> jax.Array:
    x, mask, label = batch(rng, *train, batch_size=config.bag_batch)
    logits = model.apply(params, x, mask)
    assert isinstance(logits, jax.Array)
    label = label.astype(logits.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, label).mean()

  def step(carry: Any, rng: jax.Array) -> tuple[Any, None]:
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params, rng), state)
    return (optax.apply_updates(params, updates), state), None

  x, mask, label = batch(rng_test, *test, batch_size=config.bag_tests)
  params = model.init(rng_init, x, mask)
  rngs = jax.random.split(rng_train, config.bag_steps)
  (params, _), _ = lax.scan(step, (params, optimizer.init(params)), rngs)
  logits = model.apply(params, x, mask)
  assert isinstance(logits, jax.Array)
  return ((logits > 0) == label).mean(), params
