"""Words that attention moves through a cache, beside the lower bounds.

  python -m experiments.attention_io \
    --config=configs/attention_io.py:cpu --workdir=/tmp/attention_io

cpu, 2 cores: about a minute, most of it simulation. Expect: words fall like
M^-1/2 while tiles of products are best and like 1/M from a cache of 0.6 d^2
(forward) and 1.4 d^2 (backward) words on, where FlashAttention's order is; the
better of the two stays within 4.3 to 5.3 times the bound forward and 12 to 16
times backward; simulated schedules move the counted words and return true
attention. Nothing is random but the simulated inputs. smoke: seconds, decides
nothing. full, one accelerator, not run yet: also times attention by block size,
on a TPU its kernel; that of a Hopper GPU takes blocks of 128 and the tiled XLA
code all others.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "attention-io"
  config.tier = tier
  config.seed = 0

  # Counted: queries and as many keys, head sizes, words of the cache.
  config.lengths = tuple(2**k for k in range(10, 18))
  config.dims = (32, 64, 128)
  config.caches = tuple(round(2 ** (k / 2)) for k in range(12, 37))
  config.algorithms = (
    "fwd_large",
    "fwd_fa1",
    "fwd_small",
    "bwd_large",
    "bwd_two_pass",
    "bwd_small",
    "train_large",
    "train_small",
  )

  # Exponents, at the largest length: caches as shares of d^2.
  config.slope_dim, config.slope_points = 128, 24
  config.small_shares, config.large_shares = (1 / 45, 1 / 8), (2.0, 32.0)
  # The better schedule over the bound.
  config.ratio_length, config.ratio_dim = 4096, 64
  config.ratio_caches = tuple(2**k for k in range(8, 16))
  config.crossover_dims = (64, 128)

  # Simulated.
  config.simulate_max_n = 256
  config.simulated_lengths = (64, 256)
  config.simulated_caches = (64, 256, 1024, 4096, 16384)
  # And with tiles skipped: "causal", or "block" for a block-diagonal mask of
  # so many parts.
  config.masks, config.mask_parts = ("causal", "block"), 4
  config.masked_cache = 1024

  # Grids of flash kernels: queries, keys, head size, and block sizes.
  config.traffic_shape = (256, 384, 64)
  config.traffic_blocks = (
    (16, 16), (16, 128), (32, 64), (64, 32), (64, 384), (128, 128), (256, 96),
  )  # fmt: skip

  # Attention itself, by block size; nothing is timed if there is no length.
  config.timed_lengths = ()
  config.timed_blocks = (128, 256, 512, 1024)
  config.timed_heads, config.timed_dim, config.dtype = 8, 64, "bfloat16"
  config.rounds, config.seconds_per_point = 5, 1.0

  config.accepted = ml_collections.ConfigDict()
  config.accepted.small_slope = (-0.56, -0.48)
  config.accepted.large_slope = (-1.02, -0.98)
  config.accepted.forward_ratio = (4.0, 6.0)
  config.accepted.backward_ratio = (12.0, 16.0)
  # Of d^2 words.
  config.accepted.forward_crossover = (0.5, 0.8)
  config.accepted.backward_crossover = (0.9, 1.6)
  config.accepted.error = 1e-12

  if tier == "smoke":
    config.lengths, config.dims = (64, 128), (8, 16)
    config.slope_dim, config.slope_points = 64, 6
    config.ratio_length, config.ratio_dim = 256, 16
    config.ratio_caches, config.crossover_dims = (256, 1024), (16,)
    config.simulate_max_n, config.simulated_lengths = 12, (12,)
    config.simulated_caches = (128,)
    config.masked_cache = 128
    config.traffic_shape = (32, 48, 8)
    config.traffic_blocks = ((8, 8), (16, 48))
    config.timed_lengths, config.timed_blocks = (64,), (16, 32)
    config.timed_heads, config.timed_dim, config.dtype = 1, 8, "float32"
    config.rounds, config.seconds_per_point = 1, 0.0
  elif tier == "full":
    config.timed_lengths = (4096, 16384, 32768)
  # Wall clock decides nothing, but it is measured.
  config.timed = bool(config.timed_lengths)
  return config
