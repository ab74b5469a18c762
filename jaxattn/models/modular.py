r"""Addition modulo p, learned: by one hidden layer, and by attention alone.

A network of :mod:`jaxattn.ntk.margin` is trained on cross-entropy plus

.. math:: \lambda \|\theta\|_{2, k+1}^{k+1} = \lambda \sum_i \|\theta_i\|^{k+1}.

Its margin tends to the largest as :math:`\lambda \to 0`. But from
:math:`\lambda = \gamma^* (p - 1) / p` on parameters of 0 are best: along a
network of the largest margin, with s the power of its norm, the loss
:math:`\log(1 + (p - 1) e^{-\gamma^* s}) + \lambda s` only grows. For k = 3 and
p = 97 that is 2e-5.

:class:`ModularTransformer` is one layer of attention, without positions,
residual connection or network. With the embedding E a head asks by the numbers

.. math:: A_h = E W_K W_Q^\top E^\top

of each pair of key and query, up to what does not depend on the key.
Source:
arXiv 2402.09469, sections 5 and 6.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxattn import _checks
from jaxattn.ntk.margin import PolyNet, network

__all__ = [
  "ModularTransformer",
  "PolyHistory",
  "attention_matrices",
  "fourier2d_share",
  "train_poly_net",
]

_WARMUP, _LEAST_RATE = 10, 0.01
_B1, _B2 = 0.9, 0.98
# Inputs at a time where there is no gradient.
_ROWS = 4096

Data = tuple[jax.Array, jax.Array]


class PolyHistory(NamedTuple):
  """What happened in training, at the start and after each ``log_every`` steps.

  Attributes:
    step: (num_logs,), steps taken.
    loss: (num_logs,), mean cross-entropy on all training data.
    accuracy: (num_logs,), on all training data.
    eval_accuracy: name of an evaluation set -> (num_logs,), the same on it.
  """

  step: jax.Array
  loss: jax.Array
  accuracy: jax.Array
  eval_accuracy: dict[str, jax.Array]


class ModularTransformer(nn.Module):
  r"""Adds k numbers modulo p by one layer of attention, and nothing else.

  Tokens are embedded, attend to each other in ``num_heads`` heads, and the mean
  over positions of what comes out is mapped to p logits: the order of the terms
  cannot matter. Read out at the last position alone, such a model memorizes its
  training data. There are no biases, positions, residual connections or norms.

  Called on (n, k) integers in [0, p), it returns (n, p); NaN for an input out
  of range, of which only tracing keeps from refusing it.

  Attributes:
    modulus: p.
    dim: size of an embedding.
    num_heads: heads.
    head_dim: size of a query, key and value of one head.
    embed_std: standard deviation of an embedding's numbers at first; with 1 and
      little weight decay the training data are memorized.

  Raises:
    ValueError: when called, if a field or an input does not fit.

  Cost:
    O(n k num_heads head_dim (dim + k)).

  Source:
    arXiv 2402.09469, section 6.

  Example:
    >>> import jax
    >>> from jaxattn.models import ModularTransformer
    >>> from jaxattn.ntk import modular_inputs
    >>> model, inputs = ModularTransformer(modulus=5), modular_inputs(5, 2)
    >>> params = model.init(jax.random.key(0), inputs)
    >>> model.apply(params, inputs).shape
    (25, 5)
  """

  modulus: int
  dim: int = 64
  num_heads: int = 16
  head_dim: int = 4
  embed_std: float = 0.125

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Logits (n, p)."""
    inputs = jnp.asarray(inputs)
    self._check(inputs)
    embed = nn.Embed(
      self.modulus,
      self.dim,
      embedding_init=nn.initializers.normal(self.embed_std),
      name="embed",
    )
    # A negative number, which only tracing lets in, must not count from the
    # end: it gives NaN as those from p on do.
    z = embed(jnp.where(inputs < 0, self.modulus, inputs))
    heads = self.num_heads, self.head_dim
    query, key, value = (
      nn.DenseGeneral(heads, use_bias=False, name=name)(z)
      for name in ("query", "key", "value")
    )
    out = jax.nn.dot_product_attention(query, key, value).mean(1)
    return nn.DenseGeneral(
      self.modulus, axis=(-2, -1), use_bias=False, name="head"
    )(out)

  def _check(self, inputs: jax.Array) -> None:
    _checks.check_rank("inputs", inputs, 2)
    network.check_problem(self.modulus, inputs.shape[1])
    for name in ("dim", "num_heads", "head_dim"):
      _checks.check_integer(name, getattr(self, name), 1, None)
    _checks.check_positive("embed_std", self.embed_std)
    network.check_values("inputs", inputs, self.modulus)


def attention_matrices(params: Any) -> jax.Array:
  """What each head of a :class:`ModularTransformer` asks, by key and query.

  Args:
    params: of the model.

  Returns:
    (num_heads, p, p) products of keys (rows) and queries (columns) of all
    numbers, less their mean over keys, which a softmax does not see. Logits are
    these over sqrt(head_dim).

  Raises:
    ValueError: if these are not the parameters of such a model.

  Cost:
    O(num_heads p head_dim (dim + p)).

  Source:
    arXiv 2402.09469, section 6.

  Example:
    >>> import jax
    >>> from jaxattn.models import ModularTransformer, attention_matrices
    >>> from jaxattn.ntk import modular_inputs
    >>> model, inputs = ModularTransformer(modulus=5), modular_inputs(5, 2)
    >>> params = model.init(jax.random.key(0), inputs)
    >>> matrices = attention_matrices(params)
    >>> matrices.shape, bool(abs(matrices.mean(1)).max() < 1e-6)
    ((16, 5, 5), True)
  """
  try:
    layers = params["params"]
    table = layers["embed"]["embedding"]
    kernels = layers["key"]["kernel"], layers["query"]["kernel"]
  except (KeyError, TypeError) as error:
    raise ValueError(
      "params must be those of a ModularTransformer, with an embedding, keys "
      f"and queries; {error} is missing"
    ) from error
  return _matrices(table, *kernels)


def fourier2d_share(matrix: jax.Array, *, num_bins: int = 4) -> jax.Array:
  """Share of the power of the strongest frequencies in two dimensions.

  The cosine of a sum of two angles has power in two bins of the discrete
  transform, a product of two cosines in four.

  Args:
    matrix: (..., n, n), real.
    num_bins: bins that count, at most n^2.

  Returns:
    (...,) in [0, 1]; 0 of a matrix of zeros.

  Raises:
    ValueError: if shapes, dtypes or the number do not fit.

  Cost:
    O(n^2 log n) a matrix.

  Source:
    arXiv 2402.09469, section 6.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import fourier2d_share
    >>> a = 2 * jnp.pi * jnp.arange(7) / 7
    >>> product = jnp.outer(jnp.cos(a), jnp.cos(2 * a))
    >>> print([f"{fourier2d_share(product, num_bins=n):.2f}" for n in (2, 4)])
    ['0.50', '1.00']
  """
  matrix = jnp.asarray(matrix)
  _checks.check_floating("matrix", matrix)
  if matrix.ndim < 2 or matrix.shape[-2] != matrix.shape[-1]:
    raise ValueError(f"matrix must be (..., n, n), got shape {matrix.shape}")
  _checks.check_integer("num_bins", num_bins, 1, matrix.shape[-1] ** 2)
  return _share(matrix, num_bins)


def train_poly_net(
  params: PolyNet,
  inputs: jax.Array,
  labels: jax.Array,
  *,
  num_steps: int,
  learning_rate: float | jax.Array = 5e-3,
  reg_weight: float | jax.Array = 1e-4,
  batch_size: int | None = None,
  rng: jax.Array | None = None,
  log_every: int | None = None,
  eval_sets: Mapping[str, Data] | None = None,
) -> tuple[PolyNet, PolyHistory]:
  r"""Trains a network on cross-entropy and a power of its norm.

  Adam (0.9, 0.98), with 10 steps of warm-up and a cosine schedule down to 1 %.

  Args:
    params: from :func:`jaxattn.ntk.margin.init`, not too small.
    inputs: (n, k) integers in [0, p).
    labels: (n,) integers in [0, p).
    num_steps: steps, a multiple of ``log_every``.
    learning_rate: the largest.
    reg_weight: lambda, of the (k + 1)-th power of the norm: well below
      :func:`jaxattn.ntk.max_margin`, or everything goes to 0.
    batch_size: inputs of a step, drawn with replacement; None = all of them,
      which is the better choice up to some 2^15; 1024 do beyond.
    rng: PRNG key, for batches only.
    log_every: steps from one entry of the history to the next; None =
      ``num_steps``.
    eval_sets: name -> (inputs, labels), further data to measure accuracy on.

  Returns:
    The parameters, and a :class:`PolyHistory`.

  Raises:
    ValueError: if shapes or numbers do not fit, an input or label is out of
      range, or of ``batch_size`` and ``rng`` one is given alone.

  Cost:
    O(n m (k + p)) a step, n the batch's, and O(n m) memory; as much time, with
    n that of all data, for each entry of the history.

  Source:
    arXiv 2402.09469, section 5; the power of the norm, in place of the norm
    itself, is this project's: smooth at 0, and of the same limit.

  Example:
    >>> import jax
    >>> from jaxattn.models import train_poly_net
    >>> from jaxattn.ntk import margin
    >>> inputs = margin.modular_inputs(5, 2)
    >>> labels = margin.modular_labels(inputs, 5)
    >>> params = margin.init(jax.random.key(0), 32, 5, 2)
    >>> params, log = train_poly_net(params, inputs, labels, num_steps=500)
    >>> print(log.step, log.accuracy[-1])
    [  0 500] 1.0
  """
  params = network.check_network(params)
  data = _check_data("", params, (inputs, labels))
  sets = {
    name: _check_data(f" of eval_sets[{name!r}]", params, value)
    for name, value in (eval_sets or {}).items()
  }
  _checks.check_integer("num_steps", num_steps, 1, None)
  log_every = num_steps if log_every is None else log_every
  _checks.check_integer("log_every", log_every, 1, None)
  if num_steps % log_every:
    raise ValueError(
      f"num_steps must be a multiple of log_every={log_every}, got {num_steps}"
    )
  _checks.check_scalar("learning_rate", learning_rate)
  _checks.check_positive("learning_rate", learning_rate)
  _checks.check_scalar("reg_weight", reg_weight)
  _checks.check_nonnegative("reg_weight", reg_weight)
  if batch_size is not None:
    _checks.check_integer("batch_size", batch_size, 1, None)
    if rng is None:
      raise ValueError("rng is required when batch_size is given")
  elif rng is not None:
    raise ValueError("rng must be None without a batch_size: nothing is drawn")
  return _train(
    params,
    data,
    sets,
    learning_rate,
    reg_weight,
    rng,
    num_steps=num_steps,
    log_every=log_every,
    batch_size=batch_size,
  )


# --- inside ---


def _check_data(where: str, params: PolyNet, data: Data) -> Data:
  inputs = network.check_inputs(params, data[0], f"inputs{where}")
  labels = jnp.asarray(data[1])
  if not len(inputs):
    raise ValueError(f"inputs{where} must hold an input, got none")
  _checks.check_shape(f"labels{where}", labels, (len(inputs),), "(n,)")
  network.check_values(f"labels{where}", labels, params.outer.shape[1])
  return inputs, labels


@jax.jit
def _matrices(table: jax.Array, key: jax.Array, query: jax.Array) -> jax.Array:
  keys, queries = (
    jnp.einsum("pd,dnh->nph", table, x, precision=lax.Precision.HIGHEST)
    for x in (key, query)
  )
  product = jnp.einsum(
    "nph,nqh->npq", keys, queries, precision=lax.Precision.HIGHEST
  )
  return product - product.mean(1, keepdims=True)


@functools.partial(jax.jit, static_argnums=1)
def _share(matrix: jax.Array, num_bins: int) -> jax.Array:
  power = jnp.square(jnp.abs(jnp.fft.fft2(matrix)))
  power = power.reshape(*matrix.shape[:-2], -1)
  total = power.sum(-1)
  top = lax.top_k(power, num_bins)[0].sum(-1)
  return (top / jnp.where(total > 0, total, 1)).astype(matrix.dtype)


@functools.partial(
  jax.jit, static_argnames=("num_steps", "log_every", "batch_size")
)
def _train(
  params: PolyNet,
  data: Data,
  eval_sets: dict[str, Data],
  learning_rate: float | jax.Array,
  reg_weight: float | jax.Array,
  rng: jax.Array | None,
  *,
  num_steps: int,
  log_every: int,
  batch_size: int | None,
) -> tuple[PolyNet, PolyHistory]:
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=1.0,
    warmup_steps=min(_WARMUP, num_steps // 2),
    decay_steps=num_steps,
    end_value=_LEAST_RATE,
  )
  rate = jnp.asarray(learning_rate, params.inner.dtype)
  optimizer = optax.chain(
    optax.scale_by_adam(b1=_B1, b2=_B2),
    optax.scale_by_schedule(lambda i: -rate * schedule(i)),
  )

  def loss(params: PolyNet, batch: Data) -> jax.Array:
    penalty = network.norm_power(params)
    return _cross_entropy(params, batch).mean() + reg_weight * penalty

  def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
    params, state = carry
    grads = jax.grad(loss)(params, _batch(data, rng, i, batch_size))
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  def entry(params: PolyNet, step: jax.Array) -> PolyHistory:
    value, accuracy = _scores(params, data)
    return PolyHistory(
      step=step,
      loss=value,
      accuracy=accuracy,
      eval_accuracy={k: _scores(params, v)[1] for k, v in eval_sets.items()},
    )

  def chunk(carry: Any, first: jax.Array) -> tuple[Any, PolyHistory]:
    carry, _ = lax.scan(step, carry, first + jnp.arange(log_every))
    return carry, entry(carry[0], first + log_every)

  carry = params, optimizer.init(params)
  first = entry(params, jnp.asarray(0))
  starts = jnp.arange(0, num_steps, log_every)
  (params, _), rest = lax.scan(chunk, carry, starts)
  history = jax.tree.map(
    lambda a, b: jnp.concatenate([a[None], b]), first, rest
  )
  return params, history


def _batch(
  data: Data, rng: jax.Array | None, i: jax.Array, batch_size: int | None
) -> Data:
  if batch_size is None:
    return data
  assert rng is not None
  inputs, labels = data
  rng = jax.random.fold_in(rng, i)
  rows = jax.random.randint(rng, (batch_size,), 0, len(labels))
  return inputs[rows], labels[rows]


def _cross_entropy(params: PolyNet, batch: Data) -> jax.Array:
  inputs, labels = batch
  out = network.outputs(params, inputs)
  return optax.softmax_cross_entropy_with_integer_labels(out, labels)


def _scores(params: PolyNet, data: Data) -> tuple[jax.Array, jax.Array]:
  """Mean cross-entropy and accuracy, some inputs at a time."""

  def scores(sample: Data) -> tuple[jax.Array, jax.Array]:
    a, y = sample
    out = network.outputs(params, a[None])
    loss = optax.softmax_cross_entropy_with_integer_labels(out, y[None])
    return loss[0], out[0].argmax() == y

  loss, right = lax.map(scores, data, batch_size=_ROWS)
  return loss.mean(), right.mean()
