"""Modern Hopfield retrieval: when low rank pays, digits, capacity, bags.

  python -m experiments.hopfield \
    --config=configs/hopfield.py:cpu --workdir=/tmp/hopfield

cpu, 2 cores that nothing else uses: about two minutes, most of them for the
ranks at M = 4096. Expect "reproduced": at a quarter of sqrt(log M) the rank of
the retrieval matrix is a falling share of its size and low-rank retrieval takes
time like M, dense like M^2; at 1.2 sqrt(log M) the rank is more than a quarter
of the size; no bound is violated; capacity grows at least 8-fold with each 4
dimensions; a pooling layer with memory finds one digit among many better than a
mean. smoke: seconds, decides nothing. full, one accelerator: M up to 8192.
--config.parts selects among "phase", "digits", "capacity" and "bags"; the
verdict is about those alone.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "hopfield"
  config.tier = tier
  config.seed = 0
  # Wall clock decides: nothing else may run beside this experiment.
  config.timed = True
  config.parts = ("phase", "digits", "capacity", "bags")

  # Ranks of the retrieval matrix of M queries and M patterns, entries uniform
  # in [-B, B], beta = 1 / d; B in units of sqrt(log M).
  config.dims = (4, 8)
  config.lengths = (256, 512, 1024, 2048, 4096)
  config.shares = (0.1, 0.25, 0.5, 0.75, 0.9, 1.2, 1.6)
  # Singular values below this share of the largest do not count.
  config.rank_tol = 1e-3
  # The same for entries up to B as such.
  config.table_length = 1024
  config.table_bounds = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
  # Error of an entry that plans are asked for.
  config.eps = 1e-3

  # Seconds of a dense and of a low-rank update, storing included, at one share.
  # Below 4096 a low-rank update is one part of rows, in the cache. The first
  # run was from 2048 to 16384: its low-rank slope was 0.67.
  config.timed_lengths = (4096, 8192, 16384, 32768)
  config.timed_dim, config.timed_share, config.timed_degree = 8, 0.25, 4
  config.rounds, config.seconds_per_point = 3, 1.0

  # Digits of 8 x 8 pixels, centered, of norm 1: M of them are stored.
  config.memories = (50, 100, 200, 500, 1000)
  config.betas = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
  # Queries: pixels set to 0, or noise of this norm.
  config.masked, config.noise = 0.3, 0.5
  config.max_steps, config.tol = 32, 1e-5
  # A pattern is retrieved if what comes back is this near.
  config.within = 0.1
  # Low-rank retrieval of them, by the largest logit.
  config.digit_radii = (0.25, 0.5, 1.0, 2.0)
  config.digit_degree, config.digit_memories = 2, 200

  # Capacity: patterns on the sphere of radius sqrt(d - 1), beta = 1; a pattern
  # fails if its own weight is below a half.
  config.capacity_dims = (5, 9, 13, 17)
  config.capacity_max = 2**16
  config.capacity_samples = 2000
  config.failures = 0.01
  # What the theorem promises with this probability of failure. For these
  # dimensions that is nothing: so others are measured, with a radius of
  # K sqrt(d - 1), up to so many patterns.
  config.delta = 0.001
  config.promised = ((1.0, 75), (3.0, 20))
  config.promised_max = 4096

  # Bags of digits: is there a 3?
  config.bag_sizes = (8, 16)
  config.digit = 3
  config.bag_dim, config.bag_head_dim = 32, 16
  # With which a mean has as many parameters as the memory.
  config.bag_wide_dim = 67
  config.bag_steps, config.bag_batch, config.bag_rate = 600, 64, 3e-3
  config.bag_tests, config.bag_seeds = 1000, 3
  config.num_train = 1000

  config.accepted = ml_collections.ConfigDict()
  # Of M, from each M to the next: below 1 the share falls.
  config.accepted.rank_fall = (0.0, 0.9)
  # Where a fourth of M is passed, for each d, in units of sqrt(log M).
  config.accepted.crossings = ((1.1, 1.5), (0.75, 1.05))
  config.accepted.hard_rank = 0.25
  # Of the specified ranks, each.
  config.accepted.table = (0.85, 1.15)
  config.accepted.table_ranks = (
    (5, 5, 15, 31, 62, 170, 294),
    (9, 9, 37, 48, 157, 504, 815),
  )
  config.accepted.lowrank_slope = (0.8, 1.2)
  config.accepted.dense_slope = (1.8, 2.2)
  config.accepted.bound = (0.0, 1.0)
  config.accepted.retrieved = 0.9
  # The specified numbers, powers of two, within one of them; of the last only
  # that it is more than 16384.
  config.accepted.capacity_firsts = (
    (4, 0.5, 2.0),
    (64, 0.5, 2.0),
    (2048, 0.5, 2.0),
    (16384, 2.0, 1e9),
  )
  config.accepted.capacity_growth = 8.0
  config.accepted.over_theorem = 1.0
  config.accepted.fixed = 1e-6
  # In points of accuracy.
  config.accepted.over_mean = 5.0

  if tier == "smoke":
    config.lengths, config.shares = (32, 64), (0.25, 1.2)
    config.table_length, config.table_bounds = 64, (0.25, 1.0, 4.0)
    config.accepted.table_ranks = ((5, 15, 294), (9, 37, 815))
    config.timed_lengths = (64, 128, 256)
    config.rounds, config.seconds_per_point = 1, 0.0
    config.memories, config.betas = (20, 40), (1.0, 64.0)
    config.digit_radii, config.digit_memories = (0.25, 2.0), 20
    config.capacity_dims, config.capacity_max = (5, 9), 256
    config.accepted.capacity_firsts = ((4, 0.5, 2.0), (64, 0.5, 2.0))
    config.capacity_samples = 200
    config.promised_max = 16
    config.bag_steps, config.bag_batch = 3, 8
    config.bag_tests, config.bag_seeds = 20, 1
  elif tier == "full":
    config.lengths = (256, 512, 1024, 2048, 4096, 8192)
    config.timed_lengths = (4096, 8192, 16384, 32768, 65536, 131072)
    config.capacity_max = 2**18
    config.capacity_samples = 20_000
    config.bag_seeds = 10
  return config
