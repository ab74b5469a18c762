"""Fine-tuning of a small encoder, the third part of ``ntk_attention``.

An encoder of images is trained on the digits 0 to 4. Frozen, it is adapted to 5
to 9 by one of :func:`methods`, each at the rate of learning that is best on
images held out for that.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax import lax

from jaxattn.attention import (
  prefix_attention,
  prefix_state_init,
  prefix_state_update,
  softmax_attention,
)
from jaxattn.data import load_digits
from jaxattn.models import AttentionClassifier, NTKAttention
from jaxattn.softmax import Prefix, prefix_init

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Point = dict[str, Any]


def base_point(config: Config) -> Point:
  """Parameters of the encoder trained on 0-4, and its accuracy there."""
  rng = jax.random.fold_in(jax.random.key(config.seed), 100)
  rngs = jax.random.split(rng, 3)
  train, _, test = digit_patches(rngs[0], range(5))
  params = _model(config).init(rngs[1], train[0][:1])["params"]
  apply = _model(config).apply

  def logits(params: Any, x: jax.Array) -> jax.Array:
    return apply({"params": params}, x)

  params = fit(
    rngs[2],
    logits,
    params,
    train,
    config.pretrain_rate,
    num_steps=config.pretrain_steps,
    batch_size=config.batch_size,
  )
  return {"accuracy": accuracy(logits, params, test), **_flatten(params)}


def tuning_point(
  config: Config, name: str, base: dict[str, jax.Array]
) -> Point:
  """Accuracies of all seeds at the best rate, and parameters trained."""
  base = _unflatten(base)
  init, logits = methods(config)[name](base)

  def one_run(rng: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
    rngs = jax.random.split(rng, 3)
    train, held_out, test = digit_patches(rngs[0], range(5, 10))
    params = fit(
      rngs[1],
      logits,
      init(rngs[2]),
      train,
      rate,
      num_steps=config.tune_steps,
      batch_size=config.batch_size,
    )
    return accuracy(logits, params, held_out), accuracy(logits, params, test)

  rng = jax.random.fold_in(jax.random.key(config.seed), 200)
  rng_rate, *rngs = jax.random.split(rng, config.tune_seeds + 1)
  runs = jax.jit(jax.vmap(one_run))
  # The rate is chosen on a seed of its own, and then stays.
  rates = jnp.array(config.tune_rates)
  held_out, _ = runs(jnp.stack([rng_rate] * len(rates)), rates)
  best = int(jnp.argmax(held_out))
  held_out_of_seeds, test = runs(
    jnp.stack(rngs), jnp.full(len(rngs), rates[best])
  )
  adapter = jax.eval_shape(init, rng)["adapter"]
  return {
    "accuracy": test,
    "held_out": held_out_of_seeds,
    "rate": config.tune_rates[best],
    "num_params": sum(x.size for x in jax.tree.leaves(adapter)),
  }


def fit(
  rng: jax.Array,
  logits: Callable[..., jax.Array],
  params: Any,
  data: tuple[jax.Array, jax.Array],
  rate: float | jax.Array,
  *,
  num_steps: int,
  batch_size: int,
) -> Any:
  """Adam with a cosine schedule on the cross-entropy; returns parameters."""
  schedule = optax.cosine_decay_schedule(1.0, num_steps)
  optimizer = optax.chain(
    optax.scale_by_adam(), optax.scale_by_schedule(schedule)
  )

  def loss(params: Any, batch: jax.Array) -> jax.Array:
    x, y = (z[batch] for z in data)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits(params, x), y
    ).mean()

  def step(carry: Any, rng: jax.Array) -> tuple[Any, None]:
    params, state = carry
    batch = jax.random.randint(rng, (batch_size,), 0, len(data[0]))
    updates, state = optimizer.update(jax.grad(loss)(params, batch), state)
    updates = jax.tree.map(lambda u: -rate * u, updates)
    return (optax.apply_updates(params, updates), state), None

  run = jax.jit(lambda *carry: lax.scan(step, carry, rngs)[0][0])
  rngs = jax.random.split(rng, num_steps)
  return run(params, optimizer.init(params))


def accuracy(
  logits: Callable[..., jax.Array],
  params: Any,
  data: tuple[jax.Array, jax.Array],
) -> jax.Array:
  """Share of images that are classified as they should."""
  x, y = data
  return (logits(params, x).argmax(-1) == y).mean()


def digit_patches(
  rng: jax.Array, classes: range
) -> list[tuple[jax.Array, jax.Array]]:
  """Images of some classes, 16 patches of 2 x 2, in three parts.

  A half trains, a fifth is held out to choose a rate, the rest tests.
  """
  pixels, labels = load_digits()
  kept = np.isin(labels, classes)
  pixels, labels = pixels[kept] / 8 - 1, labels[kept] - classes[0]
  n = len(pixels)
  x = pixels.reshape(n, 4, 2, 4, 2).swapaxes(2, 3).reshape(n, 16, 4)
  order = jax.random.permutation(rng, n)
  ends = n // 2, n // 2 + n // 5
  return [
    (jnp.asarray(x)[part], jnp.asarray(labels)[part])
    for part in jnp.split(order, ends)
  ]


def _model(config: Config, attention: Any = "softmax") -> Any:
  return AttentionClassifier(
    attention=attention,
    num_classes=5,
    num_heads=config.num_heads,
    head_dim=config.head_dim,
    num_layers=config.num_layers,
  )


def methods(
  config: Config,
) -> dict[str, Callable[[Any], tuple[Callable[..., Any], Callable[..., Any]]]]:
  """What is trained, by name: from the base to (init, logits).

  Each ``init`` draws {"head": ..., "adapter": ...}; the head, a new one, is
  trained by all and not counted.
  """
  state = functools.partial(_state_method, config)
  prefixes = {
    f"prefix_{m}": functools.partial(_prefix_method, config, m)
    for m in config.prefix_lengths
  }
  return {
    "head": functools.partial(_head_method, config),
    "lora": functools.partial(_lora_method, config),
    **prefixes,
    "state": functools.partial(state, None, config.state_start),
    "state_empty": functools.partial(state, None, 0),
    "state_low_rank": functools.partial(
      state, config.state_rank, config.state_start
    ),
  }


def _new_head(rng: jax.Array, base: Any) -> Any:
  kernel = base["head"]["kernel"]
  drawn = jax.random.normal(rng, kernel.shape) / len(kernel) ** 0.5
  return {"kernel": drawn, "bias": jnp.zeros_like(base["head"]["bias"])}


def _with_layers(
  config: Config,
  base: Any,
  init_layer: Callable[[jax.Array], Any],
  attend: Callable[..., jax.Array],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """A method that changes the attention of each layer alone."""
  layers = [name for name in base if name.startswith("layer_")]

  def init(rng: jax.Array) -> Any:
    rngs = jax.random.split(rng, len(layers) + 1)
    adapter = {n: init_layer(r) for n, r in zip(layers, rngs[1:], strict=True)}
    return {"head": _new_head(rngs[0], base), "adapter": adapter}

  def logits(params: Any, x: jax.Array) -> jax.Array:
    attention = tuple(
      functools.partial(attend, params["adapter"][name]) for name in layers
    )
    model = _model(config, attention)
    return model.apply({"params": base | {"head": params["head"]}}, x)

  return init, logits


def _head_method(config: Config, base: Any) -> Any:
  def attend(_: Any, query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
    return softmax_attention(query, key, value)

  return _with_layers(config, base, lambda rng: {}, attend)


def _prefix_method(config: Config, length: int, base: Any) -> Any:
  def init_layer(rng: jax.Array) -> Any:
    drawn = _draw_prefix(config, rng, length)
    return {"prefix_key": drawn.key, "prefix_value": drawn.value}

  def attend(
    prefix: Any, query: jax.Array, key: jax.Array, value: jax.Array
  ) -> jax.Array:
    return prefix_attention(query, key, value, **prefix)

  return _with_layers(config, base, init_layer, attend)


def _draw_prefix(config: Config, rng: jax.Array, length: int) -> Prefix:
  sizes = length, config.num_heads, config.head_dim
  return prefix_init(rng, *sizes, value_std=0.02)


def _state_method(
  config: Config, rank: int | None, start: int, base: Any
) -> Any:
  """A state that starts as the mean of ``start`` drawn pairs, or empty."""
  module = NTKAttention(rank=rank)

  def init_layer(rng: jax.Array) -> Any:
    if start:
      prefix = _draw_prefix(config, rng, start)
      sizes = config.num_heads, config.head_dim, config.head_dim
      total = prefix_state_update(prefix_state_init(*sizes), *prefix)
      mean = jax.tree.map(lambda x: x / start, total)
      return module.params_from_state(mean)
    heads = jnp.zeros((1, 1, config.num_heads, config.head_dim))
    return module.init(rng, heads, heads, heads)["params"]

  def attend(params: Any, *heads: jax.Array) -> Any:
    return module.apply({"params": params}, *heads)

  return _with_layers(config, base, init_layer, attend)


def _lora_method(config: Config, base: Any) -> Any:
  """Low-rank changes of the projections to queries and values."""
  rank = config.lora_rank
  layers = [name for name in base if name.startswith("layer_")]
  model = _model(config)

  def init(rng: jax.Array) -> Any:
    rng, rng_head = jax.random.split(rng)
    adapter = {}
    for i, layer in enumerate(layers):
      for j, name in enumerate(("query", "value")):
        dim, *heads = base[layer][name]["kernel"].shape
        drawn = jax.random.normal(
          jax.random.fold_in(rng, 2 * i + j), (dim, rank)
        )
        adapter[f"{layer}/{name}"] = {
          "down": drawn / dim**0.5,
          "up": jnp.zeros((rank, *heads)),
        }
    return {"head": _new_head(rng_head, base), "adapter": adapter}

  def logits(params: Any, x: jax.Array) -> jax.Array:
    changed = jax.tree.map(lambda y: y, base) | {"head": params["head"]}
    for path, pair in params["adapter"].items():
      layer, name = path.split("/")
      change = jnp.tensordot(pair["down"], pair["up"], 1)
      changed[layer][name]["kernel"] = base[layer][name]["kernel"] + change
    return model.apply({"params": changed}, x)

  return init, logits


def _flatten(params: Any) -> dict[str, Any]:
  return {
    ".".join(path): x for path, x in traverse_util.flatten_dict(params).items()
  }


def _unflatten(arrays: dict[str, Any]) -> Any:
  return traverse_util.unflatten_dict(arrays, sep=".")
