"""Two layers, softmax inside ReLU: Newton's method with sampled rows.

  python -m experiments.two_layer_regression \
    --config=configs/two_layer_regression.py:cpu --workdir=/tmp/two_layer

cpu, 2 cores that nothing else uses: one to two minutes. Expect that with 64 d
sampled rows a step takes off about nine tenths of the error, that the number of
steps is linear in log(1 / eps), at most 2.5 a decade, that sampling the term of
the data alone beats sampling the regularizer with it, and that the time of a
step grows linearly with n and at most linearly with the entries of a row.
smoke: seconds, decides nothing. full, one accelerator, not run yet: n = 1e6,
with d = 512, 1024 units and 64 entries a row where seconds are counted, with
d = 64 and 256 units elsewhere.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "two-layer-regression"
  config.tier = tier
  config.seed = 3
  # Wall clock decides: nothing else may run beside this experiment.
  config.timed = True

  # Planted instances, with normal layers and noise in the targets.
  config.dim, config.num_units = 12, 32
  config.noise = 0.01

  # Convergence from a start at distance 0.05 of the minimum, by weight of the
  # regularizer; steps are counted at the second of them.
  config.length = 4000
  config.weights = (1e-3, 1e-2, 1e-1)
  config.counted_weight = 1e-2
  config.start_distance = 0.05
  config.rows_per_dim = (16, 64)
  config.num_seeds = 8
  config.sampled_steps = 30
  config.decades = (2, 10)

  # Seconds of a step by n: a sparse first layer, one entry a row of which a
  # share is 0, so that the density is 0.01 for 64 columns. Then by entries a
  # row.
  config.timed_dim, config.timed_units = 64, 32
  config.entries, config.density = 1, 0.01
  config.timed_rows_per_dim = 16
  config.timed_lengths = (30_000, 100_000, 300_000, 1_000_000)
  config.timed_entries, config.length_of_entries = (1, 2, 4, 8, 16, 32), 30_000
  config.rounds = 3
  config.seconds_per_point = 0.3

  # Starts: how many reach the best loss, by how far they scatter.
  config.starts_length, config.starts_weight = 1000, 1e-4
  config.num_starts = 32
  config.scatter = (0.0, 0.1, 0.3, 1.0)
  config.starts_steps = 100

  # Patients in groups of which only the mean is known.
  config.num_groups, config.num_groupings = (32, 64, 128, 256), 16
  config.group_weight = 0.1

  config.accepted = ml_collections.ConfigDict()
  config.accepted.order = (1.6, 2.6)
  config.accepted.r_squared = 0.98
  # 1 / log10(1 / 0.4): the source's factor of 0.4 a step.
  config.accepted.steps_a_decade = 2.5
  config.accepted.data_over_all = 1.0
  config.accepted.entries_slope = (0.8, 1.2)

  if tier == "smoke":
    config.length, config.dim, config.num_units = 400, 4, 8
    config.weights, config.rows_per_dim = (1e-2,), (64,)
    config.num_seeds, config.sampled_steps = 2, 16
    config.decades = (2, 6)
    config.timed_dim, config.density = 8, 0.05
    config.timed_lengths = (100, 200, 400)
    config.timed_entries, config.length_of_entries = (1, 2, 4), 100
    config.rounds, config.seconds_per_point = 1, 0.0
    config.starts_length, config.num_starts = 100, 4
    config.scatter, config.starts_steps = (0.1, 1.0), 30
    config.num_groups, config.num_groupings = (32,), 2
  elif tier == "full":
    config.length, config.dim, config.num_units = 1_000_000, 64, 256
    config.num_seeds = 4
    config.timed_dim, config.timed_units = 512, 1024
    config.entries, config.density = 64, 0.125
    config.timed_lengths = (10_000, 100_000, 300_000, 1_000_000)
    config.timed_entries, config.length_of_entries = (4, 16, 64), 100_000
    config.rounds = 10
    config.starts_length, config.num_starts = 100_000, 256
  return config
