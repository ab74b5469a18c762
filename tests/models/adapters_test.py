"""Attention inside flax.linen and flax.nnx: nothing vanishes on the way."""

import functools
import inspect
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn.attention import linear_attention as library_linear_attention
from jaxattn.attention import (
  polynomial_attention,
  relu_attention,
  softmax_attention,
)
from jaxattn.models import attention_fn

_B, _T, _FEATURES, _HEADS = 2, 6, 8, 4


def _inputs(*shape):
  return jax.random.normal(jax.random.key(0), shape or (_B, _T, _FEATURES))


def _padding():
  """(B, 1, 1, S): the last one and three keys are hidden."""
  lengths = jnp.array([_T - 1, _T - 3])
  return jnp.arange(_T)[None, None, None] < lengths[:, None, None, None]


@functools.cache
def _linen_params(features):
  module = nn.MultiHeadDotProductAttention(num_heads=_HEADS)
  with jax.ensure_compile_time_eval():  # Also when first asked for under jit.
    return jax.jit(module.init)(jax.random.key(1), jnp.ones((1, features)))


@functools.cache
def _nnx_params(features, num_kv_heads):
  with jax.ensure_compile_time_eval():
    module = nnx.MultiHeadAttention(
      _HEADS, features, num_kv_heads=num_kv_heads, rngs=nnx.Rngs(1)
    )
    return nnx.state(module, nnx.Param)


def _linen(fn, x, mask=None, *, call=None, **options):
  """Applies linen's module with fixed parameters; fn None: flax's own."""
  if fn is not None:
    options["attention_fn"] = fn
  module = nn.MultiHeadDotProductAttention(num_heads=_HEADS, **options)
  params = _linen_params(x.shape[-1])
  return module.apply(params, x, mask=mask, **(call or {}))


def _nnx(fn, x, mask=None, *, call=None, **options):
  """Applies nnx's module with fixed parameters; fn None: flax's own."""
  if fn is not None:
    options["attention_fn"] = fn
  features = x.shape[-1]
  # Drawing parameters anew for each module would take most of the time.
  module = nnx.eval_shape(
    lambda: nnx.MultiHeadAttention(
      _HEADS, features, decode=False, rngs=nnx.Rngs(1), **options
    )
  )
  nnx.update(module, _nnx_params(features, options.get("num_kv_heads")))
  return module(x, mask=mask, **(call or {}))


_both = pytest.mark.parametrize("run", [_linen, _nnx])


def linear_attention(query, key, value, *, is_causal=False, key_mask=None):
  """A linear-time variant with feature map elu + 1: takes a key mask alone."""
  query, key = jax.nn.elu(query) + 1, jax.nn.elu(key) + 1
  if key_mask is not None:
    key = jnp.where(key_mask[:, :, None, None], key, 0)
  state = jnp.einsum("bsnh,bsnv->bsnhv", key, value)
  total = jnp.cumsum if is_causal else functools.partial(jnp.sum, keepdims=True)
  state, norm = total(state, axis=1), total(key, axis=1)
  out = (query[..., None] * state).sum(-2)
  return out / (query * norm).sum(-1, keepdims=True)


def _causal(dtype=jnp.float32):
  return nn.make_causal_mask(jnp.ones((_B, _T)), dtype=dtype)


_MASKS = {
  "none": lambda: None,
  "causal_float": _causal,
  "causal_bool": lambda: _causal(bool),
  "causal_int": lambda: _causal(jnp.int32),
  "causal_numpy": lambda: np.asarray(_causal()),
  "causal_nnx": lambda: nnx.make_causal_mask(jnp.ones((_B, _T))),
  "padding_bool": _padding,
  "padding_float": lambda: _padding().astype(jnp.float32),
  "both": lambda: nn.combine_masks(_causal(), _padding()),
  # Another one for each head, the same for each query.
  "heads": lambda: jnp.tril(jnp.ones((_HEADS, _T)))[None, :, None],
}


_VARIANTS = {
  "softmax": attention_fn("softmax"),
  "dot_product": attention_fn("dot_product"),
  "topk": attention_fn("topk", k=_T),  # All keys: softmax.
  "partial": attention_fn(functools.partial(softmax_attention, scale=None)),
}


@_both
@pytest.mark.parametrize("variant", list(_VARIANTS))
def test_output_is_that_of_flax_itself(run, variant):
  # All masks once, and of each kind one for the others.
  some = _MASKS if variant == "softmax" else ("none", "causal_float", "both")
  masks = {name: _MASKS[name]() for name in some}

  @jax.jit
  def outputs(x):
    fns = (_VARIANTS[variant], None)
    return {
      name: [run(fn, x, mask) for fn in fns] for name, mask in masks.items()
    }

  outs = outputs(_inputs())
  for name, (got, want) in outs.items():
    # jax.nn computes its softmax in float32.
    np.testing.assert_allclose(got, want, atol=1e-6, err_msg=name)
    if name != "none":  # And the mask does something at all.
      assert np.abs(got - outs["none"][0]).max() > 1e-3, name


@_both
@pytest.mark.parametrize("variant", ["softmax", "dot_product", "topk"])
def test_future_tokens_change_nothing_under_a_causal_mask(run, variant):
  mask = _causal()
  assert mask.dtype == jnp.float32

  @jax.jit
  def outputs(x):
    return [run(_VARIANTS[variant], x, m) for m in (mask, None)]

  x = _inputs()
  old, new = outputs(x), outputs(x.at[:, 4:].set(7 * x[:, 4:] + 1))
  np.testing.assert_array_equal(old[0][:, :4], new[0][:, :4])
  assert np.abs(old[0][:, 4:] - new[0][:, 4:]).max() > 0.01
  # Without the mask they do.
  assert np.abs(old[1][:, :4] - new[1][:, :4]).max() > 0.01


@_both
def test_gradients_are_those_of_flax_itself(run):
  mask = _MASKS["both"]()

  def loss(x, fn):
    return (run(fn, x, mask) ** 3).sum()

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  got = gradient(_inputs(), attention_fn("softmax"))
  np.testing.assert_allclose(got, gradient(_inputs(), None), atol=1e-5)


@_both
def test_dropout_is_refused_when_it_is_active(run):
  fn = attention_fn("softmax")
  call = {"deterministic": False}
  if run is _linen:
    call["dropout_rng"] = jax.random.key(2)
  else:
    call["rngs"] = nnx.Rngs(2)
  with pytest.raises(ValueError, match=r"dropout .* got dropout_rate=0\.5"):
    run(fn, _inputs(), dropout_rate=0.5, call=call)
  call = {"deterministic": True}
  got = run(fn, _inputs(), dropout_rate=0.5, call=call)
  np.testing.assert_allclose(got, run(fn, _inputs()), atol=1e-12)


@_both
def test_padding_mask_becomes_a_key_mask(run):
  fn, padding = attention_fn(linear_attention), _padding()

  @jax.jit
  def outputs(x):
    masks = (padding, padding.astype(jnp.float32), padding[:1])
    masked = [run(fn, x, mask) for mask in masks]
    return masked, [run(fn, x[:, :length]) for length in (_T - 1, _T - 3)]

  (first, second, same), (long, short) = outputs(_inputs())
  np.testing.assert_array_equal(first, second)
  np.testing.assert_allclose(first[0, : _T - 1], long[0], atol=1e-12)
  np.testing.assert_allclose(first[1, : _T - 3], short[1], atol=1e-12)
  # The last mask has one row for the whole batch.
  np.testing.assert_allclose(same[:, : _T - 1], long, atol=1e-12)


@_both
def test_a_mask_that_is_no_key_mask_is_refused(run):
  message = (
    r"mask must have shape \(B, 1, 1, S\), because linear_attention takes only "
    r"a mask of keys, got \(2, 1, 6, 6\)"
  )
  with pytest.raises(ValueError, match=message):
    run(attention_fn(linear_attention), _inputs(), _causal())


def test_key_masks_go_by_the_name_that_the_attention_takes():
  seen = []

  def both(query, key, value, *, mask=None, key_mask=None):
    seen.append((mask, key_mask))
    return query

  def neither(query, key, value):
    return query

  x = _inputs(_B, _T, _HEADS, 2)
  attention_fn(both)(x, x, x, mask=_padding())
  attention_fn(both)(x, x, x, mask=_causal(bool))
  assert seen[0][0] is None
  np.testing.assert_array_equal(seen[0][1], _padding()[:, 0, 0])
  np.testing.assert_array_equal(seen[1][0], _causal(bool))
  assert seen[1][1] is None
  with pytest.raises(ValueError, match="mask must not be set, because neither"):
    attention_fn(neither)(x, x, x, mask=_padding())


def test_causal_flag_of_nnx_goes_to_the_attention():
  call = {"is_causal": True}
  linear, option = (
    attention_fn(linear_attention),
    attention_fn("softmax", is_causal=True),
  )

  @jax.jit
  def outputs(x):
    want = _nnx(None, x, call=call)
    got = [_nnx(fn, x, call=call) for fn in (*_VARIANTS.values(), option)]
    got.append(_nnx(option, x))
    prefix = _nnx(linear, x[:, :3], call=call)
    return want, got, _nnx(linear, x, call=call), prefix

  want, got, whole, prefix = outputs(_inputs())
  for out in got:
    np.testing.assert_allclose(out, want, atol=1e-6)
  np.testing.assert_allclose(whole[:, :3], prefix, atol=1e-12)

  def acausal(query, key, value, *, mask=None):
    return query

  with pytest.raises(ValueError, match="is_causal must not be set, because ac"):
    _nnx(attention_fn(acausal), _inputs(), call=call)


def test_grouped_heads_of_nnx():
  @jax.jit
  def outputs(x):
    fns = (attention_fn("softmax"), None)
    return [_nnx(fn, x, num_kv_heads=2) for fn in fns]

  got, want = outputs(_inputs())
  np.testing.assert_allclose(got, want, atol=1e-6)


@_both
def test_more_batch_dimensions(run):
  fn, causal = attention_fn("softmax"), _causal()[0]
  mask = jnp.broadcast_to(causal, (2, 3, 1, _T, _T))

  @jax.jit
  def outputs(x):
    want = jnp.stack([run(None, x[i], mask[i]) for i in range(2)])
    # The masks after the first broadcast over the batch or lack dimensions.
    masks = (mask, mask[:1, :1], mask[:, :1], causal, causal[0])
    return want, [run(fn, x, m) for m in masks], run(fn, x[0], causal[0])

  want, got, batch = outputs(_inputs(2, 3, _T, _FEATURES))
  for out in got:
    np.testing.assert_allclose(out, want, atol=1e-6)
  np.testing.assert_allclose(batch, want[0], atol=1e-6)


def test_batch_dimensions_must_be_the_same():
  x = _inputs(2, 3, _T, _HEADS, 2)
  with pytest.raises(ValueError, match=r"one batch \(2, 3\), got shape \(3, 2"):
    attention_fn("softmax")(x, x.swapaxes(0, 1), x)


@_both
def test_no_batch_dimension(run):
  mask = _causal()

  @jax.jit
  def outputs(x):
    got = run(attention_fn("softmax"), x, mask[0])
    return got, run(None, x[None], mask[:1])[0]

  got, want = outputs(_inputs(_T, _FEATURES))
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_decoding_step_by_step_equals_the_causal_forward_pass():
  x = _inputs()
  module = nn.MultiHeadDotProductAttention(
    num_heads=_HEADS, decode=True, attention_fn=attention_fn("softmax")
  )
  shapes = jax.eval_shape(module.init, jax.random.key(1), x)["cache"]
  cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  @jax.jit
  def decode(x):
    def step(cache, token):
      variables = {**_linen_params(_FEATURES), "cache": cache}
      out, state = module.apply(variables, token[:, None], mutable=["cache"])
      return state["cache"], out[:, 0]

    return jax.lax.scan(step, cache, x.swapaxes(0, 1))[1].swapaxes(0, 1)

  want = _linen(None, x, _causal())
  np.testing.assert_allclose(decode(x), want, atol=1e-6)


@_both
def test_dtype_and_precision_are_honoured(run):
  seen = []

  def spy(query, key, value, *, precision=None):
    seen.append(({x.dtype.name for x in (query, key, value)}, precision))
    return query

  fn = attention_fn(spy)
  out = run(fn, _inputs(), dtype=jnp.bfloat16, precision="highest")
  assert seen == [({"bfloat16"}, "highest")]
  assert out.dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="precision must not be set, because do"):
    run(attention_fn("dot_product"), _inputs(), precision="highest")


def test_dtypes_are_promoted_and_precision_is_one():
  seen = []

  def spy(query, key, value, *, precision=None):
    seen.append(({x.dtype.name for x in (query, key, value)}, precision))
    return query

  fn, x = attention_fn(spy), _inputs(_B, _T, _HEADS, 2).astype(jnp.float32)
  fn(x.astype(jnp.bfloat16), x, x)
  fn(x, x, x, dtype=jnp.float16)
  high = attention_fn(spy, precision="high")
  high(x, x, x)
  high(x, x, x, precision="high")
  attention_fn(spy, precision=None)(x, x, x, precision="high")
  assert seen == [
    ({"float32"}, None),
    ({"float16"}, None),
    *[({"float32"}, "high")] * 3,
  ]
  with pytest.raises(ValueError, match="got 'highest' from the module and 'hi"):
    high(x, x, x, precision="highest")


def test_custom_promotion_is_honoured():
  def promote(arrays, *, dtype=None):
    assert dtype == jnp.float16
    return tuple(x.astype(jnp.float32) for x in arrays)

  x = _inputs(_B, _T, _HEADS, 2)
  fn = attention_fn("softmax")
  out = fn(x, x, x, dtype=jnp.float16, promote_dtype=promote)
  assert out.dtype == jnp.float32


def test_softmax_of_16_bits_is_in_float32():
  options = {"dtype": jnp.bfloat16, "force_fp32_for_softmax": True}

  @jax.jit
  def outputs(x):
    fns = (None, attention_fn("softmax"), attention_fn("dot_product"))
    return _linen(None, x), [_linen(fn, x, **options) for fn in fns]

  exact, (want, *rest) = outputs(4 * _inputs(_B, 64, _FEATURES))
  for got in rest:
    assert np.abs(got - exact).max() < 1.5 * np.abs(want - exact).max()


def test_bias_goes_to_the_attention_or_is_refused():
  x = _inputs(_B, _T, _HEADS, 2)
  bias = jax.random.normal(jax.random.key(3), (1, _HEADS, _T, _T))
  want = nn.dot_product_attention(x, x, x, bias, _padding())
  for same in (bias, bias[0]):
    got = attention_fn("softmax")(x, x, x, same, _padding())
    np.testing.assert_allclose(got, want, atol=1e-12)
  with pytest.raises(ValueError, match="bias must not be set, because topk_at"):
    attention_fn("topk", k=2)(x, x, x, bias=bias)


@_both
def test_weights_cannot_be_sown(run):
  with pytest.raises(ValueError, match="sow_weights must be False"):
    run(attention_fn("softmax"), _inputs(), call={"sow_weights": True})


def test_custom_einsums_are_refused():
  fn, x = attention_fn("softmax"), _inputs(_B, _T, _HEADS, 2)
  for name in (
    "einsum_dot_general",
    "qk_attn_weights_einsum",
    "attn_weights_value_einsum",
  ):
    with pytest.raises(ValueError, match=f"{name} must be None"):
      fn(x, x, x, **{name: jnp.einsum})
  with pytest.raises(ValueError, match="qk_attn_weights_einsum must be None"):
    _linen(
      fn,
      _inputs(),
      qk_attn_weights_einsum_cls=lambda: jnp.einsum,
      attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )


@_both
def test_additive_masks_are_refused_where_they_can_be_read(run):
  additive = jnp.where(_causal(bool), 0.0, -1e9)
  with pytest.raises(ValueError, match="only 0 and 1, got dtype float64 with"):
    run(attention_fn("softmax"), _inputs(), additive)


def test_every_keyword_of_both_frameworks_is_named():
  ours = inspect.signature(attention_fn("softmax")).parameters
  assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in ours.values())
  for flax_fn in (nn.dot_product_attention, nnx.dot_product_attention):
    theirs = inspect.signature(flax_fn).parameters
    assert set(theirs) <= set(ours)
    # What may be passed by position stands in the same place.
    assert list(theirs)[:5] == list(ours)[:5]
    for name in set(theirs) - {"promote_dtype"}:
      assert theirs[name].default == ours[name].default


def test_equal_arguments_give_one_function():
  assert attention_fn("softmax") is attention_fn(softmax_attention)
  two = attention_fn("topk", k=2)
  assert two is attention_fn("topk", k=2)
  assert two is not attention_fn("topk", k=3)
  assert two is not attention_fn("topk", k=2.0)


def test_names_stand_for_the_functions_of_the_library():
  x, padding = _inputs(_B, _T, _HEADS, 2), _padding()
  options = {"degree": 2, "radius": 4.0}

  @jax.jit
  def outputs(x):
    low = attention_fn("polynomial", **options)
    return [
      (low(x, x, x, is_causal=True),
       polynomial_attention(x, x, x, is_causal=True, **options)),
      (low(x, x, x, mask=padding),
       polynomial_attention(x, x, x, key_mask=padding[:, 0, 0], **options)),
      (attention_fn("linear", feature_map="relu")(x, x, x, mask=padding),
       library_linear_attention(
         x, x, x, key_mask=padding[:, 0, 0], feature_map="relu")),
      (attention_fn("relu", threshold=0.1)(x, x, x, mask=padding),
       relu_attention(x, x, x, mask=padding, threshold=0.1)),
    ]  # fmt: skip

  for got, want in outputs(x):
    np.testing.assert_allclose(got, want, atol=1e-12)
  with pytest.raises(ValueError, match="linear-time attention cannot take an"):
    attention_fn("polynomial", **options)(x, x, x, mask=_causal(bool))


def test_options_reach_the_attention():
  x = _inputs(_B, _T, _HEADS, 2)
  got = attention_fn("softmax", scale=0.3, local_window_size=(2, 0))(x, x, x)
  want = softmax_attention(x, x, x, scale=0.3, local_window_size=(2, 0))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  ("attention", "options", "message"),
  [
    ("sparse", {}, "one of 'softmax', .*, 'topk', got 'sparse'"),
    (
      linear_attention,
      {"degree": 4},
      "linear_attention takes the options is_causal, got 'degree'",
    ),
    ("softmax", {"mask": None}, r"takes the options scale, .*, got 'mask'"),
    ("softmax", {"return_residual": True}, "got 'return_residual'"),
    ("topk", {"k": 2, "return_info": True}, "got 'return_info'"),
    ("topk", {}, "topk_attention needs the option 'k'"),
    ("polynomial", {"degree": 2}, "polynomial_attention needs the option 'rad"),
    (
      "softmax",
      {"scale": np.ones(2)},
      "option 'scale' must be hashable, .* got ndarray",
    ),
    (3, {}, "attention must be a name or a function, got 3"),
    (
      lambda query, key, value, **options: query,
      {},
      r"must name all its keywords, got <lambda> with \*\*kwargs",
    ),
  ],
)
def test_bad_construction_is_refused_by_message(attention, options, message):
  with pytest.raises(ValueError, match=message):
    attention_fn(attention, **options)


def test_missing_flax_is_explained(monkeypatch):
  for name in [n for n in sys.modules if n.split(".")[:2] == _MODELS]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, "flax", None)
  with pytest.raises(ImportError, match=r"pip install 'jaxattn\[models\]'"):
    __import__("jaxattn.models")


_MODELS = ["jaxattn", "models"]
