r"""What a query sees beside a prefix, and how the two share its weight.

Attention to a context of keys :math:`k_c` and values :math:`v_c` alone answers
:math:`o_c(x) = \sum_c e^{k_c \cdot x} v_c / z_c(x)` with
:math:`z_c(x) = \sum_c e^{k_c \cdot x}`. All that a prefix can know of a context
is the pair :math:`(o_c, \log z_c)` of a datum: kernels, limits and training
take it from there. Source: arXiv 1805.02867 for the merge of two softmaxes.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class PrefixContext(NamedTuple):
  """Attention of each datum to its context alone, without the prefix.

  What ``softmax_attention(..., scale=1.0, return_residual=True)`` returns, with
  batch, positions and heads flattened into one axis of data: one causal pass
  over a sequence gives the contexts of all its positions.

  Source: this project.

  Attributes:
    output: (n, v).
    log_mass: (n,) log of the sum of exp(logits); -inf for no context.
  """

  output: jax.Array
  log_mass: jax.Array


# A pair of keys (L, d) or (n, L, d) and values (L, v) or (n, L, v), or what
# attention to them gave.
Context = PrefixContext | tuple[jax.Array, jax.Array]

# Queries and their contexts.
Datum = tuple[jax.Array, PrefixContext | None]


def summarize(
  caller: str, name: str, context: Context | None, x: jax.Array
) -> PrefixContext | None:
  """The context as attention to it; None stays."""
  if context is None:
    return None
  if isinstance(context, PrefixContext):
    context = PrefixContext(*map(jnp.asarray, context))
    n = len(x)
    _checks.check_shape(f"{name}.output", context.output, (n, None), "(n, v)")
    _checks.check_shape(f"{name}.log_mass", context.log_mass, (n,), "(n,)")
    for field, y in context._asdict().items():
      _checks.check_floating(f"{name}.{field}", y)
    return context
  if not isinstance(context, (tuple, list)) or len(context) != 2:
    raise ValueError(
      f"{name} must be a pair (key, value) or a PrefixContext, got "
      f"{type(context).__name__}"
    )
  key, value = map(jnp.asarray, context)
  _check_pairs(caller, name, key, value, x)
  return _attend(x, key, value)


def _check_pairs(
  caller: str, name: str, key: jax.Array, value: jax.Array, x: jax.Array
) -> None:
  n, d = x.shape
  for field, y, size, last in (
    ("key", key, d, "d"),
    ("value", value, None, "v"),
  ):
    full = f"{name} {field}"
    _checks.check_floating(full, y)
    _checks.check_rank(full, y, (2, 3))
    own = y.ndim == 3
    shape = (n, None, size) if own else (None, size)
    meaning = f"(n, L, {last})" if own else f"(L, {last})"
    _checks.check_shape(full, y, shape, meaning)
    if 0 in y.shape:
      raise ValueError(f"{full} must not be empty, got shape {y.shape}")
  if key.ndim != value.ndim:
    raise ValueError(
      f"{name} key and value must both be of one datum each or both of all, "
      f"got shapes {key.shape} and {value.shape}"
    )
  if key.shape[-2] != value.shape[-2]:
    raise ValueError(
      f"{caller}: context key length {key.shape[-2]} != context value length "
      f"{value.shape[-2]}"
    )


@jax.jit
def _attend(x: jax.Array, key: jax.Array, value: jax.Array) -> PrefixContext:
  _, (x, key, value) = widen((x, key, value))
  many = "n" if key.ndim == 3 else ""
  logits = einsum(f"nd,{many}ld->nl", x, key)
  output = einsum(f"nl,{many}lv->nv", jax.nn.softmax(logits), value)
  return PrefixContext(output, jax.nn.logsumexp(logits, -1))


def widen(arrays: Any) -> tuple[Any, Any]:
  """The dtype that a tree of arrays promotes to, and them in float32 or wider.

  Returns:
    That dtype, and the tree.
  """
  dtype = jnp.result_type(*jax.tree.leaves(arrays))
  wide = accumulator(dtype)
  return dtype, jax.tree.map(lambda y: y.astype(wide), arrays)


def check_bias(prefix_bias: float | jax.Array, count_normalized: bool) -> None:
  """Raises unless bias and count are such as prefixes can have."""
  _checks.check_scalar("prefix_bias", prefix_bias)
  low, high = -math.inf, math.inf
  _checks.check_range("prefix_bias", prefix_bias, low, high, closed=False)
  _checks.check_choice("count_normalized", count_normalized, (False, True))


def check_data(name: str, x: jax.Array, dim: int | None = None) -> None:
  """Raises unless ``x`` holds data."""
  _checks.check_floating(name, x)
  _checks.check_shape(name, x, (None, dim), "(n, d)")
  if 0 in x.shape:
    raise ValueError(f"{name} must not be empty, got shape {x.shape}")


def check_values(name: str, context: PrefixContext | None, size: int) -> None:
  """Raises unless the values of a context are of the size of the prefix's."""
  if context is not None and context.output.shape[-1] != size:
    raise ValueError(
      f"{name} must have values of size {size}, as the prefix has, got "
      f"{context.output.shape[-1]}"
    )


def check_train(train: tuple[str, ...]) -> None:
  """Raises unless ``train`` names what is trained, in one spelling."""
  choices = ("key", "value"), ("key",), ("value",)
  _checks.check_choice("train", train, choices)


def share(
  log_prefix: jax.Array, context: PrefixContext | None
) -> tuple[jax.Array, jax.Array]:
  """Log of the whole mass, and what the context adds to the output.

  Args:
    log_prefix: (n,) log of the mass of the prefix.
    context: of the n data, or None.

  Returns:
    (n,) and (n, v), or 0 without a context.
  """
  if context is None:
    return log_prefix, jnp.zeros((), log_prefix.dtype)
  total = jnp.logaddexp(log_prefix, context.log_mass)
  return total, jnp.exp(context.log_mass - total)[:, None] * context.output


def check_pair(
  caller: str,
  x1: jax.Array,
  x2: jax.Array | None,
  context1: Context | None,
  context2: Context | None,
  sizes: tuple[int | None, int | None],
) -> list[Datum]:
  """Checked data with their contexts; one entry if ``x2`` is None.

  Args:
    caller: name of the function, for messages.
    x1: first data.
    x2: second data, or None.
    context1: of the first.
    context2: of the second.
    sizes: of keys and of values, None for any.
  """
  if x2 is None and context2 is not None:
    raise ValueError("context2 must be None if x2 is, got a context")
  if x2 is not None and (context1 is None) != (context2 is None):
    which = "context1" if context2 is None else "context2"
    raise ValueError(
      f"context1 and context2 must both be given or both be None, got {which}"
    )
  data: list[Datum] = []
  for i, (x, context) in enumerate(((x1, context1), (x2, context2)), 1):
    if x is None:
      continue
    x = jnp.asarray(x)
    dim, value_dim = sizes
    check_data(f"x{i}", x, dim)
    summary = summarize(caller, f"context{i}", context, x)
    if value_dim is not None:
      check_values(f"context{i}", summary, value_dim)
    data.append((x, summary))
    sizes = x.shape[1], value_dim or (summary and summary.output.shape[1])
  return data


def check_prefix(key: jax.Array, value: jax.Array) -> None:
  """Raises unless the arrays are a prefix of one head."""
  for name, y in (("prefix_key", key), ("prefix_value", value)):
    _checks.check_floating(name, y)
    _checks.check_rank(name, y, 2)
    if 0 in y.shape:
      raise ValueError(f"{name} must not be empty, got shape {y.shape}")
  _checks.check_shape("prefix_value", value, (len(key), None), "(m, v)")


def log_weight(
  prefix_bias: float | jax.Array, count_normalized: bool, length: int
) -> Any:
  """What is added to each logit of a prefix."""
  return prefix_bias - (math.log(length) if count_normalized else 0.0)
