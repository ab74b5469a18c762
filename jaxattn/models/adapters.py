"""Plugs attention functions into flax's multi-head attention modules.

``flax.linen.MultiHeadDotProductAttention`` and ``flax.nnx.MultiHeadAttention``
compute queries, keys and values and hand them to an ``attention_fn``. Linen
passes only those keywords that the function's signature names: with
``**kwargs`` there, or with a name left out, a mask or a dropout rate vanishes
without a word. The adapter therefore names every keyword of both frameworks,
and each is either honoured or refused with a ValueError.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import dtypes

from jaxattn import _checks
from jaxattn import attention as attention_lib

# Any: with an option some return more than an array, which is refused here.
Attention = Callable[..., Any]

_NAMED: dict[str, Attention] = {
  "softmax": attention_lib.softmax_attention,
  "dot_product": jax.nn.dot_product_attention,
  "polynomial": attention_lib.polynomial_attention,
  "linear": attention_lib.linear_attention,
  "relu": attention_lib.relu_attention,
  "topk": attention_lib.topk_attention,
}

# What comes with each call, and what would make the result more than an array.
_NO_OPTIONS = ("bias", "mask", "key_mask", "return_info", "return_residual")


def attention_fn(
  attention: str | Attention, **options: Any
) -> Callable[..., jax.Array]:
  """Makes an ``attention_fn=`` for linen's and nnx's attention modules.

  The same arguments give the same function, so that a module built twice is
  compiled once.

  * Masks of 0 and 1 in any dtype, as ``nn.make_causal_mask`` makes them, become
    boolean; other values are refused where they can be read, which is outside
    ``jit``. An additive mask is a bias.
  * A mask of shape (B, 1, 1, S) becomes a ``key_mask`` for an attention that
    takes one; an attention that takes only that refuses every other mask.
  * ``bias``, ``is_causal`` and ``precision`` go to the attention if it takes
    them, and are refused if not. Inputs are promoted to ``dtype`` first.
  * Refused: dropout and ``sow_weights``, for which the attention would have to
    hand out its weights, and custom einsums. ``force_fp32_for_softmax`` is what
    every attention here does with 16-bit inputs.

  Args:
    attention: ``"softmax"`` (:func:`jaxattn.attention.softmax_attention`),
      ``"dot_product"`` (``jax.nn.dot_product_attention``), ``"polynomial"``
      (:func:`jaxattn.attention.polynomial_attention`; needs ``degree`` and
      ``radius``), ``"linear"`` (:func:`jaxattn.attention.linear_attention`),
      ``"relu"`` (:func:`jaxattn.attention.relu_attention`), ``"topk"``
      (:func:`jaxattn.attention.topk_attention`; needs ``k``), or a function
      ``(query, key, value, *, mask=None or key_mask=None, ...)`` in the layout
      (B, T, N, H) that names all its keywords.
    **options: keyword arguments of that attention, fixed for all calls;
      hashable.

  Returns:
    A function with the keywords of ``nn.dot_product_attention`` and
    ``nnx.dot_product_attention``, for queries (..., T, N, H).

  Raises:
    ValueError: if the name is unknown, ``attention`` is no function or takes
      ``**kwargs``, or an option is unknown, missing, unhashable or belongs to
      each call. The function returned raises ValueError for what it refuses.

  Cost:
    That of the attention. With two or more batch dimensions masks and biases
    are broadcast over them.

  Source:
    this project.

  Example:
    >>> import flax.linen as nn
    >>> import jax
    >>> from jaxattn.models import attention_fn
    >>> module = nn.MultiHeadDotProductAttention(
    ...   num_heads=2, attention_fn=attention_fn("topk", k=3)
    ... )
    >>> x = jax.random.normal(jax.random.key(0), (1, 8, 4))
    >>> y, _ = module.init_with_output(jax.random.key(1), x)
    >>> y.shape
    (1, 8, 4)
  """
  if isinstance(attention, str):
    _checks.check_choice("attention", attention, tuple(_NAMED))
    attention = _NAMED[attention]
  if not callable(attention):
    raise ValueError(f"attention must be a name or a function, got {attention}")
  _check_options(attention, options)
  # The type keeps k=2 and k=2.0, which are equal, apart.
  return _adapt(
    attention, tuple((n, type(v), v) for n, v in sorted(options.items()))
  )


def _check_options(attention: Attention, options: Mapping[str, Any]) -> None:
  name = _name(attention)
  parameters = inspect.signature(attention).parameters
  if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    raise ValueError(
      f"attention must name all its keywords, got {name} with **kwargs"
    )
  keywords = list(parameters.values())[3:]  # After query, key, value.
  choices = [p.name for p in keywords if p.name not in _NO_OPTIONS]
  for option, value in options.items():
    if option not in choices:
      raise ValueError(
        f"{name} takes the options {', '.join(choices)}, got {option!r}"
      )
    try:
      hash(value)
    except TypeError as error:
      raise ValueError(
        f"option {option!r} must be hashable, because it is static under jit, "
        f"got {type(value).__name__}"
      ) from error
  for p in keywords:
    if p.default is p.empty and p.name not in (*options, *_NO_OPTIONS):
      raise ValueError(f"{name} needs the option {p.name!r}")


def _name(attention: Attention) -> str:
  return getattr(attention, "__name__", repr(attention))


@functools.lru_cache(maxsize=256)
def _adapt(
  attention: Attention, options: tuple[tuple[str, type, Any], ...]
) -> Callable[..., jax.Array]:
  keywords = list(inspect.signature(attention).parameters.values())[3:]
  # A mask or bias without a default must be said to be absent.
  fixed = {p.name: None for p in keywords if p.default is p.empty}
  fixed |= {name: value for name, _, value in options}

  def fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    promote_dtype: Any = None,
    is_causal: bool = False,
  ) -> jax.Array:
    # Without dropout the first two say nothing; the third is always so.
    del broadcast_dropout, dropout_rng, force_fp32_for_softmax
    if dropout_rate > 0 and not deterministic:
      raise ValueError(
        "attention dropout is undefined for low-rank attention, and none here "
        "offers it: set dropout_rate=0 or deterministic=True, got "
        f"dropout_rate={dropout_rate}"
      )
    if module is not None:
      raise ValueError(
        "sow_weights must be False (module=None): the attention returns no "
        "weights"
      )
    _refuse_einsum("einsum_dot_general", einsum_dot_general)
    _refuse_einsum("qk_attn_weights_einsum", qk_attn_weights_einsum)
    _refuse_einsum("attn_weights_value_einsum", attn_weights_value_einsum)
    if promote_dtype is None:
      inputs = dtypes.promote_dtype(query, key, value, dtype=dtype)
    else:
      inputs = promote_dtype((query, key, value), dtype=dtype)
    batch = query.shape[:-3]
    inputs = [_flatten(x, batch) for x in inputs]
    call = {
      "bias": None if bias is None else _align(bias, batch),
      "precision": precision,
      "is_causal": is_causal or None,
    }
    if mask is not None:
      call |= _mask_argument(attention, _align(_to_bool(mask), batch), inputs)
    out = attention(*inputs, **_merge(attention, fixed, call))
    return out.reshape(*batch, *out.shape[-3:])

  return fn


def _refuse_einsum(name: str, value: Any) -> None:
  if value is not None:
    raise ValueError(f"{name} must be None: there is no einsum to replace")


def _merge(
  attention: Attention, fixed: Mapping[str, Any], call: Mapping[str, Any]
) -> dict[str, Any]:
  call = {name: value for name, value in call.items() if value is not None}
  for name, value in call.items():
    if name not in inspect.signature(attention).parameters:
      raise ValueError(
        f"{name} must not be set, because {_name(attention)} takes no {name}"
      )
    if name == "precision" and fixed.get(name) not in (None, value):
      raise ValueError(
        f"precision must be one, got {value!r} from the module and "
        f"{fixed[name]!r} as an option"
      )
  return {**fixed, **call}


def _to_bool(mask: jax.Array | np.ndarray) -> jax.Array:
  """The one place that takes flax's masks of 0.0 and 1.0 for boolean."""
  if mask.dtype == jnp.bool_:
    return jnp.asarray(mask)
  concrete = _checks.is_concrete(mask)
  if concrete and not np.isin(jax.device_get(mask), (0, 1)).all():
    raise ValueError(
      f"mask must be boolean or hold only 0 and 1, got dtype {mask.dtype} with "
      "other values; an additive mask is a bias"
    )
  return jnp.asarray(mask) != 0


def _mask_argument(
  attention: Attention, mask: jax.Array, inputs: list[jax.Array]
) -> dict[str, jax.Array]:
  """Returns ``mask`` under the name that the attention takes it by."""
  takes = inspect.signature(attention).parameters
  if "key_mask" not in takes:
    return {"mask": mask}
  if mask.shape[-3:-1] == (1, 1):
    *batch, length, _, _ = inputs[1].shape
    return {"key_mask": jnp.broadcast_to(mask[..., 0, 0, :], (*batch, length))}
  if "mask" in takes:
    return {"mask": mask}
  raise ValueError(
    f"mask must have shape (B, 1, 1, S), because {_name(attention)} takes only "
    f"a mask of keys, got {mask.shape}; a causal one is is_causal=True"
  )


def _flatten(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
  """Makes one batch dimension out of two or more."""
  if len(batch) > 1 and x.shape[:-3] != batch:
    raise ValueError(
      f"query, key and value must have one batch {batch}, got shape {x.shape}"
    )
  return x.reshape(-1, *x.shape[-3:]) if len(batch) > 1 else x


def _align(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
  """Gives a mask or bias of lower rank the rank of flattened queries."""
  x = jnp.reshape(x, (1,) * (len(batch) + 3 - x.ndim) + x.shape)
  if len(batch) > 1:
    x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
  return _flatten(x, batch)
