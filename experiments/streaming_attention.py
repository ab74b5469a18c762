"""Attention over streams in memory that does not grow with them.

Questions about arXiv 2311.14652:

1. How do memory and error go with the length n: of moments, summed where keys
   and values arrive together, and of three sketches, where they do not? What
   does centering gain, and what is left of float32 behind 2^20 tokens that come
   one by one?
2. Does a stream of 2^22 tokens, which is never kept, need more memory than a
   short one: by its program, and by what the process really takes?
3. How long is a step of decoding, beside a cache of all keys and values?
4. How large are errors on a photograph, and on the tokens of a text?
5. How often are the few queries unlike the rest found from a sketch of all
   outputs, by its width; and from streams of keys and values on, which are
   longer than the sketches are large?
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import _streams, harness
from jaxattn.attention import (
  MomentState,
  ThreeSketchState,
  moment_init,
  moment_query,
  moment_update,
  softmax_attention,
  state_bytes,
  streaming,
  three_sketch_decode,
  three_sketch_finalize,
  three_sketch_init,
  three_sketch_update_key,
  three_sketch_update_query,
  three_sketch_update_value,
)
from jaxattn.features import (
  attention_error_bound,
  polynomial_coefficients,
  polynomial_error,
)
from jaxattn.scaling import fit_slope
from jaxattn.sketch import count_sketch_recover, count_sketch_table
from jaxattn.softmax import (
  OnlineSoftmax,
  online_softmax_finalize,
  online_softmax_init,
  online_softmax_update,
)

# Dimensions of keys, degree and radius of the streams whose error is measured.
_DIM, _DEGREE, _RADIUS = 4, 4, 2.0
# Of the one whose memory is, and of the specified ratio of memories.
_LONG_DIM, _LONG_DEGREE = 8, 2
_K = 16
# The range of the outputs there, and the largest logit over the radius.
_IMAGE_SPREADS = {1.0: 0.33, 2.0: 0.57, 4.0: 0.78}
_IMAGE_LOGIT = 0.95
# Specified errors of moments by length, in one stream.
_MOMENT_ERRORS = {1000: 3.6e-4, 4000: 1.7e-4, 16_000: 1.3e-4, 64_000: 3.0e-5}
# Specified errors on the photograph, by degree and radius; those of 4 and of 8
# dimensions agree.
_IMAGE_ERRORS = {
  (2, 1.0): 7.6e-3,
  (2, 2.0): 1.5e-2,
  (2, 4.0): 1.1e-1,
  (4, 1.0): 1.0e-4,
  (4, 2.0): 1.2e-3,
  (4, 4.0): 4.6e-2,
  (6, 1.0): 2.0e-6,
  (6, 2.0): 3.3e-5,
  (6, 4.0): 6.8e-3,
}
# Of the polynomial that stands for exp where outputs of all queries to a long
# stream are wanted: relative errors of 5e-8 within the radius.
_REFERENCE_DEGREE = 10
_MIB = 1 << 20

# A ConfigDict: what type a field has is known at run time only.
Config = Any


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  # First, before anything else has taken memory.
  long = {
    n: wd.point(f"long/n={n}", functools.partial(long_point, config, n))
    for n in config.long_lengths
  }
  errors = wd.point("error", functools.partial(error_point, config))
  sweep = wd.point("sweep", functools.partial(sweep_point, config))
  drift = wd.point("drift", functools.partial(drift_point, config))
  seconds = _seconds(wd)
  image = wd.point("image", functools.partial(image_point, config))
  text = wd.point("text", functools.partial(text_point, config))
  recovery = _recovery(wd)
  end = wd.point("end_to_end", functools.partial(end_point, config))
  found = errors, sweep, seconds, image, text, recovery, end
  harness.save_figure(wd, _draw(config, *found), _figure_data(config, *found))
  return harness.finish(
    wd,
    claim=(
      "One pass over a stream, in memory that does not grow with it, is enough "
      "for attention to all of it; and of the outputs, those few that are "
      "unlike the rest are found from a sketch with probability 0.99."
    ),
    source="arXiv:2311.14652, theorem 1.2",
    paper="o(n) memory, probability 0.99 (no numbers)",
    checks=[
      *_length_checks(config, errors, sweep),
      *_memory_checks(config),
      *_drift_checks(config, drift),
      *_long_checks(config, long),
      *_image_checks(config, image),
      *_text_checks(config, text),
      *_recovery_checks(config, recovery, end),
    ],
    timed=[*_peak_checks(config, long), *_time_checks(config, seconds)],
  )


# --- error by length ---


def error_point(config: Config) -> dict[str, Any]:
  """(lengths, streams) largest errors of both states, over all queries.

  With what the sketches give without centering, and the range of the outputs.
  """
  lengths = harness.progress(config.lengths, "lengths")
  return _errors_along(config, config.eps2, lengths)


def sweep_point(config: Config) -> dict[str, Any]:
  """(accuracies, streams) largest errors of three sketches at one length."""
  lengths = (config.sweep_length,)
  found = [
    _errors_along(config, eps2, lengths)["sketch"][0]
    for eps2 in harness.progress(config.sweep_eps2, "buckets")
  ]
  buckets = [math.ceil(2 / eps2**2) for eps2 in config.sweep_eps2]
  return {"error": np.array(found), "buckets": np.array(buckets)}


def _errors_along(
  config: Config, eps2: float, lengths: Iterable[int]
) -> dict[str, np.ndarray]:
  """Errors at some lengths of the same streams, by kind of state."""
  with jax.enable_x64(True):
    rngs = _keys(config, 0, config.num_streams)
    query = _uniform(_key(config, 1), (config.num_queries, _DIM))
    states = jax.vmap(functools.partial(_empty, config, query, eps2))(rngs)
    step = jax.vmap(functools.partial(_step, config, query), (0, None))
    errors = jax.jit(jax.vmap(functools.partial(_errors, query)))
    found, begin = [], 0
    for n in lengths:
      end = n // config.chunk_size
      states = streaming.stream(step, states, range(begin, end))
      found.append(jax.device_get(errors(states)))
      begin = end
  names = "moments", "sketch", "uncentered", "spread"
  return {
    name: np.array(x)
    for name, x in zip(names, zip(*found, strict=True), strict=True)
  }


def _empty(
  config: Config, query: jax.Array, eps2: float, rng: jax.Array
) -> tuple[Any, ...]:
  """Seed of a stream, and states of moments, sketches and exact attention."""
  of_stream, of_sketch = jax.random.split(rng)
  moments = moment_init(1, 1, _DIM, 1, degree=_DEGREE, dtype=query.dtype)
  # All queries are decoded: the error is that of the first two sketches.
  sketch = three_sketch_init(
    of_sketch, dim=_DIM, value_dim=1, degree=_DEGREE, k=config.num_queries,
    eps1=0.5, eps2=eps2, dtype=query.dtype,
  )  # fmt: skip
  return of_stream, moments, sketch, _nothing_seen(query, 1)


def _nothing_seen(query: jax.Array, value_dim: int) -> OnlineSoftmax:
  hidden = jnp.full((len(query), 1), -jnp.inf, query.dtype)
  return online_softmax_init(hidden, jnp.zeros((1, value_dim), query.dtype))


def _step(
  config: Config, query: jax.Array, states: tuple[Any, ...], i: jax.Array
) -> tuple[Any, ...]:
  """States behind one chunk more of one stream."""
  rng, moments, sketch, exact = states
  start = i * config.chunk_size
  pair = _uniform(
    jax.random.fold_in(rng, i), (config.chunk_size, _DIM + 1), query.dtype
  )
  key, value = pair[:, :_DIM], pair[:, _DIM:]
  moments = moment_update(moments, key[None, :, None], value[None, :, None])
  sketch = three_sketch_update_value(sketch, start, value)
  sketch = three_sketch_update_key(sketch, start, key)
  logits = query @ key.T / math.sqrt(_DIM)
  return rng, moments, sketch, online_softmax_update(exact, logits, value)


def _errors(query: jax.Array, states: Any) -> tuple[jax.Array, ...]:
  _, moments, sketch, exact = states
  want = online_softmax_finalize(exact)[0]
  # Both at once, as two streams.
  both = jax.tree.map(
    lambda *x: jnp.concatenate(x), moments, uncentered_moments(sketch)
  )
  queries = jnp.stack([query, query])[:, :, None]
  got, uncentered = moment_query(both, queries, radius=_RADIUS)[:, :, 0]
  sketch = three_sketch_finalize(sketch)
  sketch = three_sketch_update_query(sketch, 0, query, radius=_RADIUS)
  num = len(query)
  indices, values, mean = three_sketch_decode(sketch, num_queries=num, k=num)
  out = jnp.zeros(num, query.dtype).at[indices[0]].set(values[0]) + mean
  errors = (abs(x - want).max() for x in (got, out[:, None], uncentered))
  return *errors, jnp.ptp(want)


def uncentered_moments(state: ThreeSketchState) -> MomentState:
  """What the sketches of keys and values give by themselves."""
  product = state.key_sketch[:, :-1].T @ state.value_sketch
  return _as_moments(state, product)


def sketched_moments(state: ThreeSketchState) -> MomentState:
  """What a finalized state answers by, before its answers are sketched."""
  mean = state.value_sum / state.feature_sum[0]
  return _as_moments(
    state, state.product + state.feature_sum[:, None] * mean[None]
  )


def _as_moments(state: ThreeSketchState, product: jax.Array) -> MomentState:
  moments = jnp.concatenate([product, state.feature_sum[:, None]], 1)
  return MomentState(
    moments[None, None],
    jnp.zeros_like(moments)[None, None],
    state.max_norm[None, None],
    state.num_keys[None],
    state.degree,
  )


def _answers(state: MomentState, query: jax.Array) -> jax.Array:
  """(T, Hv) to queries (T, H) of one head."""
  return moment_query(state, query[None, :, None], radius=_RADIUS)[0, :, 0]


# --- digits ---


def drift_point(config: Config) -> dict[str, np.ndarray]:
  """(lengths,) relative errors of float32 moments of tokens one by one."""
  rng = _key(config, 8)

  def step(states: Any, i: jax.Array) -> Any:
    state, plain, exact = states
    pair = jax.random.uniform(jax.random.fold_in(rng, i), (2,), jnp.float32)
    key, value = pair.reshape(2, 1, 1, 1, 1)
    state = moment_update(state, key, value)
    plain = dataclasses.replace(plain, compensation=0 * plain.compensation)
    plain = moment_update(plain, key, value)
    k, v = pair.astype(jnp.float64)
    column = jnp.stack([jnp.ones_like(k), k, k * k])
    exact += column[:, None] * jnp.stack([v, jnp.ones_like(v)])[None]
    return state, plain, exact

  with jax.enable_x64(True):
    # Two: loops may take over what they start from.
    state, plain = (moment_init(1, 1, 1, 1, degree=2) for _ in range(2))
    states, begin = (state, plain, jnp.zeros((3, 2))), 0
    found: dict[str, list[float]] = {"compensated": [], "plain": []}
    for n in config.drift_lengths:
      states = streaming.stream(step, states, range(begin, n))
      begin = n
      for name, state in zip(found, states[:2], strict=True):
        got = np.asarray(state.moments[0, 0], np.float64)
        error = abs(got / np.asarray(states[2]) - 1).max()
        found[name].append(float(error))
  return {name: np.array(x) for name, x in found.items()}


# --- a stream that is never kept ---


def long_point(config: Config, n: int) -> dict[str, float]:
  """Memory of a stream of n tokens, and the error behind it."""
  query = config.long_bound * _uniform(
    _key(config, 3), (config.num_queries, _LONG_DIM), jnp.float32
  )
  state = (
    moment_init(1, 1, _LONG_DIM, _LONG_DIM, degree=_LONG_DEGREE),
    _nothing_seen(query, _LONG_DIM),
  )
  program = long_pass(config, n).lower(state, query).compile()
  memory = program.memory_analysis()
  if memory is None:
    raise RuntimeError("this platform reports no memory analysis")
  peak, (moments, exact) = _streams.peak_bytes(lambda: program(state, query))
  radius = _long_radius(config)
  got = moment_query(moments, query[None, :, None], radius=radius)[0, :, 0]
  error = abs(got - online_softmax_finalize(exact)[0]).max()
  return {
    "program": memory.temp_size_in_bytes
    + memory.argument_size_in_bytes
    + memory.output_size_in_bytes,
    "peak": peak,
    "state": state_bytes(moments),
    "tokens": int(moments.count[0]),
    "error": float(error),
  }


def long_pass(config: Config, n: int) -> Any:
  """(state, query) -> state behind n tokens, drawn where they are needed."""
  size = config.long_chunk_size

  def step(carry: Any, i: jax.Array) -> Any:
    state, query = carry
    moments, exact = state
    rng = jax.random.fold_in(_key(config, 4), i)
    key, value = _uniform(rng, (2, size, _LONG_DIM), jnp.float32)
    key = config.long_bound * key
    moments = moment_update(moments, key[None, :, None], value[None, :, None])
    logits = query @ key.T / math.sqrt(_LONG_DIM)
    return (moments, online_softmax_update(exact, logits, value)), query

  def walk(state: Any, query: jax.Array) -> Any:
    return streaming.stream(step, (state, query), range(n // size))[0]

  return jax.jit(walk)


def _long_radius(config: Config) -> float:
  """No logit is larger."""
  return config.long_bound**2 * math.sqrt(_LONG_DIM)


def cache_bytes(n: int, dim: int) -> int:
  """Bytes of n keys and values in float32."""
  return 2 * 4 * n * dim


# --- seconds of a step ---


def _seconds(wd: harness.Workdir) -> dict[str, np.ndarray]:
  """(contexts,) seconds by contestant and size, as "state 8"."""
  found: dict[str, np.ndarray] = {}
  for dim, degree in harness.progress(wd.config.decode_sizes, "seconds"):
    point = wd.point(
      f"seconds/dim={dim}",
      functools.partial(seconds_point, wd.config, dim, degree),
    )
    found |= {f"{name} {dim}": x for name, x in point.items()}
  return found


def seconds_point(config: Config, dim: int, degree: int) -> dict[str, Any]:
  """One token more and one answer by a state; the answer alone by a cache."""
  states, caches = {}, {}
  for n in config.contexts:
    key, value = jax.random.normal(_key(config, 5), (2, 1, n, 1, dim)) / dim
    state = moment_init(1, 1, dim, dim, degree=degree)
    state, query = moment_update(state, key, value), key[:, :1]
    states[str(n)] = functools.partial(decode_step, state, query)
    caches[str(n)] = functools.partial(cached_step, query, key, value)
  # States in turn, for their times are to be equal; but none beside a cache of
  # megabytes, which leaves no state where a processor is quick to find it.
  rounds, at_least = config.rounds, config.seconds_per_point
  in_turn = harness.least_seconds(
    states, rounds=rounds, at_least=at_least * len(states)
  )
  alone = harness.least_seconds(
    caches, rounds=rounds, at_least=at_least, in_turn=False
  )
  return {
    "state": np.array(list(in_turn.values())),
    "cache": np.array(list(alone.values())),
  }


@jax.jit
def decode_step(state: Any, token: jax.Array) -> Any:
  """State with one token more, and the answer to it."""
  state = moment_update(state, token, token)
  return state, moment_query(state, token, radius=1.0)


# What is left of a step with a cache that holds the token already.
cached_step = jax.jit(softmax_attention)


# --- real streams ---


def image_point(config: Config) -> dict[str, Any]:
  """(models, radii) largest errors on a photograph; and it, denoised."""
  pixels, patches = _streams.load_image(config.num_pixels)
  found = _real_errors(config, config.image_models, patches, pixels)
  dim, degree, radius = config.shown_model
  key = _streams.stream_keys(patches, dim, radius)
  state = _filled(key, pixels, degree)
  out = moment_query(
    state, jnp.asarray(key)[None, :, None], radius=radius, scale=1.0
  )
  shape = -1, _streams.IMAGE_WIDTH, 3
  return {
    **found,
    "image": np.asarray(pixels.reshape(shape), np.float16),
    "denoised": np.asarray(out.reshape(shape), np.float16),
  }


def text_point(config: Config) -> dict[str, Any]:
  """(models, radii) largest errors on the tokens of a text."""
  embeddings, following = _streams.load_tokens(config.max_tokens)
  found = _real_errors(config, config.text_models, embeddings, following)
  return {**found, "tokens": len(embeddings)}


def _real_errors(
  config: Config,
  models: tuple[tuple[int, int], ...],
  source: np.ndarray,
  value: np.ndarray,
) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(config.seed)
  probes = rng.choice(len(source), config.num_probes, replace=False)
  shape = len(models), len(config.radii)
  found = {
    name: np.zeros(shape)
    for name in ("error", "over_bound", "spread", "largest_logit", "single")
  }
  for i, (dim, degree) in enumerate(harness.progress(models, "models")):
    for j, radius in enumerate(config.radii):
      key = _streams.stream_keys(source, dim, radius)
      point = functools.partial(_real_error, key, value, probes, degree, radius)
      with jax.enable_x64(True):
        for name, x in point(np.float64).items():
          found[name][i, j] = x
      # Where little is left of the error but rounding: as it was specified.
      found["single"][i, j] = point(np.float32)["error"]
  return found


def _real_error(
  key: np.ndarray,
  value: np.ndarray,
  probes: np.ndarray,
  degree: int,
  radius: float,
  dtype: Any,
) -> dict[str, float]:
  """Largest error of some tokens' outputs, over its bound and as it is."""
  key, value = key.astype(dtype), value.astype(dtype)
  query = jnp.asarray(key[probes])[None, :, None]
  keys, values = (jnp.asarray(x)[None, :, None] for x in (key, value))
  exact = softmax_attention(query, keys, values, scale=1.0)
  state = _filled(key, value, degree)
  out = moment_query(state, query, radius=radius, scale=1.0)
  eps = polynomial_error(polynomial_coefficients(degree, radius), radius)
  bound = attention_error_bound(eps, values)[0, 0]
  by_column = abs(out - exact).max((0, 1, 2))
  logit = max(abs(key @ row).max() for row in key[probes])
  return {
    "error": float(by_column.max()),
    "over_bound": float((by_column / bound).max()),
    "spread": float(jnp.ptp(exact, 1).max()),
    "largest_logit": float(logit / radius),
  }


def _filled(key: np.ndarray, value: np.ndarray, degree: int) -> Any:
  """State of a stream that is read chunk by chunk."""
  dtype = jnp.result_type(float)
  state = moment_init(
    1, 1, key.shape[1], value.shape[1], degree=degree, dtype=dtype
  )
  chunks = _streams.chunks(np.concatenate([key, value], 1))
  return streaming.stream(
    functools.partial(_add_rows, key.shape[1]), state, chunks
  )


def _add_rows(dim: int, state: Any, chunk: tuple[jax.Array, jax.Array]) -> Any:
  rows, mask = chunk
  key, value = (x[None, :, None] for x in (rows[:, :dim], rows[:, dim:]))
  return moment_update(state, key, value, key_mask=mask[None])


# --- recovery ---


def _recovery(wd: harness.Workdir) -> dict[str, np.ndarray]:
  """(sparsities, widths) shares of vectors that are found, and of ratios."""
  config: Config = wd.config
  points = [
    wd.point(f"recovery/k={k}", functools.partial(recovery_point, config, k))
    for k in harness.progress(config.sparsities, "recovery")
  ]
  return {way: np.array([p[way] for p in points]) for way in points[0]}


def recovery_point(config: Config, k: int) -> dict[str, Any]:
  """Shares of k-sparse vectors that are found, by width.

  And of nearly sparse ones the 99th percentile of the distance to what is
  found, over that to the best k entries.
  """
  rngs = _keys(config, 6 + k, config.num_seeds)
  found = []
  with jax.enable_x64(True):
    for by_k in config.widths_by_k:
      one = functools.partial(_distances, config, k, by_k * k)
      distances = jax.jit(functools.partial(lax.map, one, batch_size=20))(rngs)
      shares = np.mean(distances[:, :2] < config.recovered_within, 0)
      found.append([*shares, np.quantile(distances[:, 2], 0.99)])
  with_fit, without, ratio = np.array(found).T
  return {"with fit": with_fit, "without": without, "ratio": ratio}


def _distances(config: Config, k: int, width: int, rng: jax.Array) -> jax.Array:
  """From a random sparse vector to what is recovered, with and without fit.

  And over the best, from one with a tail, with the fit.
  """
  of_place, of_value, of_seeds, of_tail = jax.random.split(rng, 4)
  place = jax.random.permutation(of_place, config.size)[:k]
  x = jnp.zeros(config.size).at[place].set(jax.random.normal(of_value, (k,)))
  seeds = jax.random.bits(of_seeds, (config.depth, 2), jnp.uint32)
  near = x + config.tail * jax.random.normal(of_tail, x.shape)
  table = count_sketch_table(seeds, jnp.stack([x, near], 1), width)
  indices, values = count_sketch_recover(seeds, table, config.size, k)
  fitted, ratio = (
    jnp.linalg.norm(y.at[i].add(-z))
    for y, i, z in zip((x, near), indices, values, strict=True)
  )
  i, z = count_sketch_recover(
    seeds, table[..., 0], config.size, k, refine=False
  )
  without = jnp.linalg.norm(x.at[i].add(-z))
  return jnp.stack([fitted, without, ratio / _tail(near, k)])


def _tail(x: jax.Array, k: int) -> jax.Array:
  """Distance of vectors to the best k entries of each."""
  return jnp.linalg.norm(jnp.sort(abs(x), -1)[..., :-k], axis=-1)


def end_point(config: Config) -> dict[str, Any]:
  """From keys, values and queries to those unlike the rest."""
  with jax.enable_x64(True):
    one = functools.partial(_end_to_end, config)
    rngs = _keys(config, 7, config.num_runs)
    walk = jax.jit(functools.partial(lax.map, one))
    found = {k: np.asarray(x) for k, x in walk(rngs).items()}
    sizes = jax.eval_shape(functools.partial(_end_state, config), rngs[0])
  # Of the first run and column: how far outputs are from 0, and from the mean.
  outputs = found.pop("outputs")[0]
  stream = config.num_keys * (_DIM + 3) * sizes.value_sum.dtype.itemsize
  return {
    **found,
    "outputs": -np.sort(-abs(outputs)),
    "memory": state_bytes(sizes) / stream,
  }


def _end_state(config: Config, rng: jax.Array) -> ThreeSketchState:
  return three_sketch_init(
    rng, dim=_DIM, value_dim=3, degree=_DEGREE, k=_K, eps1=config.end_eps1,
    eps2=config.end_eps2, dtype=jnp.float64,
  )  # fmt: skip


def _end_to_end(config: Config, rng: jax.Array) -> dict[str, jax.Array]:
  """By column, what is found and how far it is from the outputs."""
  rngs = jax.random.split(rng, 6)
  key = _uniform(rngs[0], (config.num_keys, _DIM))
  # Values that go with keys: else outputs differ by less than the sketches do;
  # and away from 0: else there would be nothing to center.
  value = _uniform(rngs[1], (config.num_keys, 3))
  value = 0.5 + 0.8 * key[:, :3] + 0.2 * value
  special = jnp.sort(jax.random.permutation(rngs[2], config.size)[:_K])
  sides = jax.random.rademacher(rngs[3], (_K, _DIM), jnp.float64)
  query = config.end_others * _uniform(rngs[4], (config.size, _DIM))
  query = query.at[special].set(sides)
  state = _sketched(config, _end_state(config, rngs[5]), key, value)
  sketched = _answers(sketched_moments(state), query)
  state = three_sketch_update_query(state, 0, query, radius=_RADIUS)
  indices, values, mean = three_sketch_decode(
    state, num_queries=config.size, k=_K
  )
  reference = moment_init(
    1, 1, _DIM, 3, degree=_REFERENCE_DEGREE, dtype=jnp.float64
  )
  reference = moment_update(reference, key[None, :, None], value[None, :, None])
  outputs = _answers(reference, query).T
  y, e = outputs - mean[:, None], sketched.T - outputs
  rows = jnp.arange(3)[:, None]
  error = jnp.linalg.norm(y.at[rows, indices].add(-values), axis=1)
  tail, noise = _tail(y, _K), jnp.linalg.norm(e, axis=1)
  more = 1 + config.end_eps1
  # What the first two sketches and the polynomial put on an output.
  eps = polynomial_error(polynomial_coefficients(_DEGREE, _RADIUS), _RADIUS)
  # Values are within 1 of 1/2.
  entry = 2 * math.tanh(math.atanh(eps) / 2)
  weights = jax.nn.softmax(sides @ key.T / math.sqrt(_DIM), -1)
  squares = ((value - mean[None]) ** 2).sum(0)
  of_sketch = config.end_eps2 * jnp.sqrt(
    (weights**2).sum(1)[None] * squares[:, None]
  )
  return {
    "found": (jnp.sort(indices, 1) == special[None]).all(1),
    "over_promise": error / (more * tail + (1 + more) * noise),
    "over_best": error / tail,
    "over_bound": (abs(e[:, special]) / (entry + 3 * of_sketch)).max(1),
    "tail": tail,
    "tail_uncentered": _tail(outputs, _K),
    "outputs": jnp.stack([outputs[0], y[0]]),
  }


def _sketched(
  config: Config, state: ThreeSketchState, key: jax.Array, value: jax.Array
) -> ThreeSketchState:
  """State behind all values, and then all keys, chunk by chunk."""
  size = config.end_chunk_size
  starts = size * jnp.arange(len(key) // size, dtype=jnp.uint32)
  for update, x in (
    (three_sketch_update_value, value),
    (three_sketch_update_key, key),
  ):
    chunks = starts, x.reshape(len(starts), size, -1)
    state = streaming.stream(
      functools.partial(_add_chunk, update), state, chunks
    )
  return three_sketch_finalize(state)


def _add_chunk(update: Any, state: Any, chunk: Any) -> Any:
  return update(state, *chunk)


def _uniform(
  rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float64
) -> jax.Array:
  return jax.random.uniform(rng, shape, dtype, -1.0, 1.0)


def _key(config: Config, n: int) -> jax.Array:
  return jax.random.fold_in(jax.random.key(config.seed), n)


def _keys(config: Config, n: int, num: int) -> jax.Array:
  return jax.random.split(_key(config, n), num)


# --- checks ---


def _length_checks(
  config: Config, errors: dict[str, Any], sweep: dict[str, Any]
) -> list[harness.Check]:
  lengths = np.array(config.lengths)
  slopes = {
    way: fit_slope(lengths, errors[way].mean(1)).slope
    for way in ("moments", "sketch")
  }
  of_buckets = fit_slope(sweep["buckets"], sweep["error"].mean(1)).slope
  eps = polynomial_error(polynomial_coefficients(_DEGREE, _RADIUS), _RADIUS)
  # Values are within 1 of 0.
  bound = 2 * math.tanh(math.atanh(eps) / 2)
  accepted = config.accepted
  ratio = errors["sketch"][-1].mean() / errors["moments"][-1].mean()
  n = lengths[-1]
  checks = [
    harness.Check(
      "slope of the error of moments in n",
      slopes["moments"],
      *accepted.moment_slope,
    ),
    harness.Check(
      "slope of the error of three sketches in n",
      slopes["sketch"],
      *accepted.sketch_slope,
    ),
    harness.Check(
      "slope of the error of three sketches in buckets",
      of_buckets,
      *accepted.bucket_slope,
    ),
    harness.Check(
      "largest error of moments over its bound",
      errors["moments"].max() / bound,
      high=accepted.error_over_bound,
    ),
    harness.Check(f"error of sketches over that of moments, n={n}", ratio),
    harness.Check(
      f"error of three sketches over the spread of outputs, n={n}",
      errors["sketch"][-1].mean() / errors["spread"][-1].mean(),
      accepted.sketch_over_spread,
    ),
    harness.Check(
      "error without centering over that with it, all n",
      errors["uncentered"].mean() / errors["sketch"].mean(),
      accepted.centering_gain,
    ),
  ]
  factor = accepted.moment_factor
  for i, n in enumerate(config.lengths):
    specified = _MOMENT_ERRORS.get(n)
    moments = (specified / factor, specified * factor) if specified else ()
    sketch = accepted.sketch_error if specified else ()
    checks += [
      harness.Check(
        f"error of moments, n={n}", errors["moments"][i].mean(), *moments
      ),
      harness.Check(
        f"error of three sketches, n={n}", errors["sketch"][i].mean(), *sketch
      ),
      harness.Check(f"spread of outputs, n={n}", errors["spread"][i].mean()),
    ]
  return checks


def _memory_checks(config: Config) -> list[harness.Check]:
  n = config.lengths[-1]
  cache = cache_bytes(n, _LONG_DIM)
  states = {
    "state": moment_init(1, 1, _LONG_DIM, _LONG_DIM, degree=_LONG_DEGREE),
    "three sketches": _long_sketch(config),
  }
  return [
    harness.Check(
      f"cache over {name} in bytes, H={_LONG_DIM}, n={n}",
      cache / state_bytes(state),
      config.accepted.cache_over_state,
    )
    for name, state in states.items()
  ]


def _long_sketch(config: Config) -> ThreeSketchState:
  return three_sketch_init(
    jax.random.key(0), dim=_LONG_DIM, value_dim=_LONG_DIM, degree=_LONG_DEGREE,
    k=_K, eps1=config.end_eps1, eps2=config.eps2,
  )  # fmt: skip


def _drift_checks(
  config: Config, drift: dict[str, np.ndarray]
) -> list[harness.Check]:
  checks = []
  for i, n in enumerate(config.drift_lengths):
    checks += [
      harness.Check(
        f"drift of float32 moments, {n} updates of one token",
        drift["compensated"][i],
        high=config.accepted.drift,
      ),
      harness.Check(
        f"drift without compensation, {n} updates of one token",
        drift["plain"][i],
      ),
    ]
  return checks


def _long_checks(
  config: Config, long: dict[int, dict[str, Any]]
) -> list[harness.Check]:
  short, last = (long[n] for n in config.long_lengths)
  degree, radius = _LONG_DEGREE, _long_radius(config)
  eps = polynomial_error(polynomial_coefficients(degree, radius), radius)
  bound = 2 * math.tanh(math.atanh(eps) / 2)
  n = config.long_lengths[-1]
  return [
    harness.Check("tokens of the long stream", last["tokens"], n, n),
    harness.Check("state of the long stream, bytes", last["state"]),
    harness.Check(
      "state of the long stream over that of the short one",
      last["state"] / short["state"],
      1.0,
      1.0,
    ),
    harness.Check(
      "program of the long stream over that of the short one, bytes",
      last["program"] / short["program"],
      high=1.01,
    ),
    harness.Check("program of the long stream, MiB", last["program"] / _MIB),
    harness.Check(
      "error on the long stream over its bound",
      last["error"] / bound,
      high=config.accepted.error_over_bound,
    ),
  ]


def _peak_checks(
  config: Config, long: dict[int, dict[str, Any]]
) -> list[harness.Check]:
  n = config.long_lengths[-1]
  peak, cache = long[n]["peak"], cache_bytes(n, _LONG_DIM)
  short = long[config.long_lengths[0]]["peak"]
  # A stream as short as that of tier smoke is less than what a run takes.
  high = math.inf if config.tier == "smoke" else config.accepted.peak_over_cache
  return [
    harness.Check(
      f"peak memory of the process on {n} tokens over a cache of them",
      peak / cache,
      high=high,
    ),
    harness.Check(f"peak memory on {n} tokens, MiB", peak / _MIB),
    harness.Check(
      f"peak memory on {config.long_lengths[0]} tokens, MiB", short / _MIB
    ),
    harness.Check(f"cache of {n} tokens, MiB", cache / _MIB),
  ]


def _time_checks(
  config: Config, seconds: dict[str, np.ndarray]
) -> list[harness.Check]:
  checks = []
  n = np.array(config.contexts)
  raced = config.contexts.index(config.raced_context)
  for (dim, _), pair in zip(
    config.decode_sizes, config.slope_contexts, strict=True
  ):
    ends = [config.contexts.index(x) for x in pair]
    state, cache = seconds[f"state {dim}"], seconds[f"cache {dim}"]
    checks += [
      # A step that is quicker behind more tokens is no growth.
      harness.Check(
        f"seconds of a step, state, H={dim}, n={n[-1]} over n={n[0]}",
        state[-1] / state[0],
        high=config.accepted.state_growth,
      ),
      harness.Check(
        f"slope of seconds of a step, cache, H={dim}, n={pair[0]} to {pair[1]}",
        float(np.diff(np.log(cache[ends]))[0] / np.diff(np.log(pair))[0]),
        *config.accepted.cache_slope,
      ),
      harness.Check(
        f"seconds of a step, cache over state, H={dim}, n={n[raced]}",
        float(cache[raced] / state[raced]),
        config.accepted.speedup,
      ),
    ]
  return checks


def _image_checks(config: Config, image: dict[str, Any]) -> list[harness.Check]:
  checks = []
  for i, (dim, degree) in enumerate(config.image_models):
    for j, radius in enumerate(config.radii):
      specified = _IMAGE_ERRORS[degree, radius]
      error = image["single"][i, j]
      where = f"photograph, H={dim}, degree {degree}, R={radius:g}"
      checks += [
        harness.Check(
          f"error over the specified one, {where}",
          error / specified,
          *config.accepted.image_ratio,
        ),
        harness.Check(f"error, {where}", error),
      ]
  # Outputs and logits are of the probes, whatever the model.
  for j, radius in enumerate(config.radii):
    spread = image["spread"][0, j]
    checks += [
      harness.Check(
        f"spread of outputs over the specified one, photograph, R={radius:g}",
        spread / _IMAGE_SPREADS[radius],
        *config.accepted.spread_ratio,
      ),
      harness.Check(f"spread of outputs, photograph, R={radius:g}", spread),
    ]
  checks.append(
    harness.Check(
      "largest logit over the radius and the specified one, photograph",
      image["largest_logit"][0, 0] / _IMAGE_LOGIT,
      *config.accepted.spread_ratio,
    )
  )
  checks += _bound_checks(config, "photograph", image)
  return checks


def _text_checks(config: Config, text: dict[str, Any]) -> list[harness.Check]:
  checks = [harness.Check("tokens of the text", text["tokens"])]
  for i, (dim, degree) in enumerate(config.text_models):
    for j, radius in enumerate(config.radii):
      where = f"text, H={dim}, degree {degree}, R={radius:g}"
      error = text["single"][i, j]
      checks += [
        harness.Check(f"error, {where}", error),
        harness.Check(
          f"error over the spread of outputs, {where}",
          error / text["spread"][i, j],
        ),
      ]
  return checks + _bound_checks(config, "text", text)


def _bound_checks(
  config: Config, name: str, found: dict[str, Any]
) -> list[harness.Check]:
  return [
    harness.Check(
      f"largest error over its bound, {name}",
      found["over_bound"].max(),
      high=config.accepted.error_over_bound,
    )
  ]


def _recovery_checks(
  config: Config, recovery: dict[str, np.ndarray], end: dict[str, Any]
) -> list[harness.Check]:
  checks = []
  # Eps of 1/2: 8 k buckets are what the promise is for.
  promised = config.widths_by_k.index(8)
  for k, found in zip(config.sparsities, recovery["with fit"], strict=True):
    checks.append(
      harness.Check(
        f"found, k={k}, {8 * k} buckets",
        float(found[promised]),
        config.accepted.success,
      )
    )
  for k, ratio in zip(config.sparsities, recovery["ratio"], strict=True):
    checks.append(
      harness.Check(
        f"error over that of the best entries, k={k}, {8 * k} buckets, "
        "99th percentile",
        float(ratio[promised]),
        high=1 + config.end_eps1,
      )
    )
  without = recovery["without"][config.sparsities.index(_K), promised]
  checks.append(
    harness.Check(
      f"found without the fit, k={_K}, {8 * _K} buckets",
      float(without),
      *config.accepted.without_fit,
    )
  )
  checks += [
    harness.Check(
      "found, from keys to decoding",
      float(end["found"].all(1).mean()),
      config.accepted.success,
    ),
    harness.Check(
      "share of decoded columns with the promised error",
      float((end["over_promise"] <= 1).mean()),
      config.accepted.success,
    ),
    harness.Check(
      "error of decoded columns over that of the best entries, largest",
      end["over_best"].max(),
    ),
    harness.Check(
      "largest error of a sketched output over its bound",
      end["over_bound"].max(),
      high=config.accepted.error_over_bound,
    ),
    harness.Check(
      f"three sketches over their stream of {config.num_keys} tokens, bytes",
      end["memory"],
      high=config.accepted.sketch_over_stream,
    ),
    harness.Check(
      f"norm of the outputs behind the first {_K} over that less the mean",
      float((end["tail_uncentered"] / end["tail"]).mean()),
    ),
  ]
  return checks


# --- figure ---


def _draw(
  config: Config,
  errors: dict[str, Any],
  sweep: dict[str, Any],
  seconds: dict[str, np.ndarray],
  image: dict[str, Any],
  text: dict[str, Any],
  recovery: dict[str, np.ndarray],
  end: dict[str, Any],
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(2, 4, figsize=(18.0, 8.0))
  _draw_errors(axes[0, 0], config, errors, sweep)
  _draw_memory(axes[0, 1], config)
  _draw_seconds(axes[0, 2], config, seconds)
  _draw_image(axes[1, 0], config, image)
  _draw_real(axes[1, 1], config, image, text)
  _draw_recovery(axes[1, 2], config, recovery)
  _draw_outputs(axes[0, 3], end)
  _draw_tails(axes[1, 3], config, recovery)
  return figure


def _draw_errors(
  ax: Axes, config: Config, errors: dict[str, Any], sweep: dict[str, Any]
) -> None:
  names = {"moments": "moments", "sketch": "three sketches"}
  for way, label in names.items():
    harness.plot_loglog(ax, config.lengths, errors[way].mean(1), label=label)
  n = [config.sweep_length] * len(sweep["buckets"])
  least, most = sweep["buckets"].min(), sweep["buckets"].max()
  ax.loglog(
    n, sweep["error"].mean(1), "_", color=harness.PALETTE[1], markersize=12,
    markeredgewidth=1.5, markeredgecolor=harness.PALETTE[1],
    label=f"with {least} to {most} buckets",
  )  # fmt: skip
  ax.loglog(
    config.lengths, errors["spread"].mean(1), "--", color="gray",
    label="spread of outputs",
  )  # fmt: skip
  label = f"largest error of {config.num_queries} queries"
  ax.set(title="Error", xlabel="tokens", ylabel=label, ylim=(None, 10.0))
  ax.legend(loc="upper right")


def _draw_memory(ax: Axes, config: Config) -> None:
  lengths = np.array(config.lengths)
  for i, (dim, degree) in enumerate(config.decode_sizes):
    color = harness.PALETTE[i]
    state = state_bytes(moment_init(1, 1, dim, dim, degree=degree))
    cache = [cache_bytes(int(n), dim) for n in lengths]
    ax.loglog(lengths, cache, "--", color=color, label=f"cache, H = {dim}")
    flat = np.full(len(lengths), state)
    ax.loglog(lengths, flat, "o-", color=color, label=f"state, H = {dim}")
  sketch = state_bytes(_long_sketch(config))
  label = f"three sketches, H = {_LONG_DIM}"
  ax.axhline(sketch, ls=":", color=harness.PALETTE[2], label=label)
  ax.set(title="Memory", xlabel="tokens", ylabel="bytes", ylim=(None, 1e12))
  ax.legend(loc="upper left")


def _draw_seconds(
  ax: Axes, config: Config, seconds: dict[str, np.ndarray]
) -> None:
  for i, (dim, _) in enumerate(config.decode_sizes):
    for name, style in (("cache", "s--"), ("state", "o-")):
      ax.loglog(
        config.contexts,
        1e3 * seconds[f"{name} {dim}"],
        style,
        color=harness.PALETTE[i],
        label=f"{name}, H = {dim}",
      )
  ax.set(title="A step of decoding", xlabel="tokens", ylabel="milliseconds")
  ax.legend()


def _draw_image(ax: Axes, config: Config, image: dict[str, Any]) -> None:
  both = np.concatenate([image["image"], image["denoised"]], 0)
  ax.imshow(np.clip(both.astype(np.float32), 0, 1))
  ax.set(xticks=[], yticks=[])
  ax.grid(visible=False)
  dim, degree, radius = config.shown_model
  state = moment_init(1, 1, dim, 3, degree=degree)
  ax.set_title(f"Attention by {state_bytes(state)} bytes, R = {radius:g}")


def _draw_real(
  ax: Axes, config: Config, image: dict[str, Any], text: dict[str, Any]
) -> None:
  cases = [
    *(
      ("photograph", m, e) for m, e in zip(config.image_models, image["single"])
    ),
    *(("text", m, e) for m, e in zip(config.text_models, text["single"])),
  ]
  styles = {"photograph": "o-", "text": "s--"}
  degrees = sorted({g for _, (_, g), _ in cases})
  for name, (dim, degree), error in cases:
    ax.semilogy(
      config.radii,
      error,
      styles[name],
      color=harness.PALETTE[degrees.index(degree)],
      alpha=0.5 if dim == 4 else 1.0,
      label=f"{name}, H = {dim}, degree {degree}",
    )
  label = "largest error, float32"
  ax.set(title="Error on real streams", xlabel="radius", ylabel=label)
  # Room for the legend.
  ax.set_ylim(bottom=ax.get_ylim()[0] / 1e3)
  ax.legend(fontsize=8, loc="lower right")


def _draw_recovery(
  ax: Axes, config: Config, recovery: dict[str, np.ndarray]
) -> None:
  for way, style in (("with fit", "o-"), ("without", "s--")):
    for i, (k, found) in enumerate(zip(config.sparsities, recovery[way])):
      ax.plot(
        config.widths_by_k,
        found,
        style,
        color=harness.PALETTE[i],
        label=f"k = {k}" if style == "o-" else None,
      )
  ax.plot([], [], "s--", color="gray", label="without the fit")
  ax.set(title="Recovery", xlabel="buckets over k", ylabel="share found")
  ax.legend()


def _draw_outputs(ax: Axes, end: dict[str, Any]) -> None:
  labels = "outputs", "outputs less the mean"
  for i, (y, label) in enumerate(zip(end["outputs"], labels, strict=True)):
    rank = np.arange(len(y)) + 1
    ax.loglog(rank, abs(y), color=harness.PALETTE[i], label=label)
  ax.axvline(_K, ls=":", color="gray", label=f"k = {_K}")
  ax.set(title="What a sketch may find", xlabel="rank", ylabel="size")
  ax.legend(loc="center right", bbox_to_anchor=(0.94, 0.45))


def _draw_tails(
  ax: Axes, config: Config, recovery: dict[str, np.ndarray]
) -> None:
  for i, (k, ratio) in enumerate(zip(config.sparsities, recovery["ratio"])):
    color = harness.PALETTE[i]
    ax.semilogy(config.widths_by_k, ratio, "o-", color=color, label=f"k = {k}")
  ax.axhline(1 + config.end_eps1, ls=":", color="gray", label="promised at 8")
  ax.set(
    title="Recovery of what is nearly sparse",
    xlabel="buckets over k",
    ylabel="error over the best, 99th percentile",
  )
  ax.legend()


def _figure_data(
  config: Config,
  errors: dict[str, Any],
  sweep: dict[str, Any],
  seconds: dict[str, np.ndarray],
  image: dict[str, Any],
  text: dict[str, Any],
  recovery: dict[str, np.ndarray],
  end: dict[str, Any],
) -> dict[str, Any]:
  return {
    "lengths": np.array(config.lengths),
    "contexts": np.array(config.contexts),
    "radii": np.array(config.radii),
    "widths_by_k": np.array(config.widths_by_k),
    "moments": errors["moments"],
    "sketch": errors["sketch"],
    "buckets": sweep["buckets"],
    "by_buckets": sweep["error"],
    "spread": errors["spread"],
    "image": image["single"],
    "text": text["single"],
    "outputs": end["outputs"],
    **{f"seconds {k}": v for k, v in seconds.items()},
    **{f"recovery {k}": v for k, v in recovery.items()},
  }


if __name__ == "__main__":
  harness.main(run, "streaming-attention")
