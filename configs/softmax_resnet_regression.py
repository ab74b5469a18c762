"""Softmax regression with a skip: Newton's method, exact and with sampled rows.

  python -m experiments.softmax_resnet_regression \
    --config=configs/softmax_resnet_regression.py:cpu --workdir=/tmp/resnet

cpu, 2 cores that nothing else uses: two to four minutes. Expect exact steps
that converge quadratically; steps with m rows drawn by leverage that contract
by about sqrt(d / m) in the norm of the Hessian, so that the number of steps is
linear in log(1 / eps); and an error of sampled Hessians of about
2 sqrt(d / m) + d / m. The verdict then falls on how seconds of a step grow with
d: almost linearly where it is sampled, almost quadratically where it is exact.
smoke: seconds, decides nothing. full, one accelerator, not run yet: 32 targets
at once in float32, n = 4e6 and d = 1024; all else in float64, up to n = 4e6 or
d = 1024, convergence at n = 1e6 and d = 256.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "softmax-resnet-regression"
  config.tier = tier
  config.seed = 1
  # Wall clock decides: nothing else may run beside this experiment.
  config.timed = True

  # Planted instances: noise is a share of each target, weight / n the weight of
  # the regularizer, and the features' columns shrink to 1 / condition.
  config.noise = 0.05
  config.weight = 0.1
  config.condition = 30.0

  # Convergence. Sampled steps begin where exact ones have brought the error
  # down to near times the first.
  config.length, config.dim = 20_000, 32
  config.near = 1e-2
  config.rows_per_dim = (8, 32, 128)
  config.num_seeds = 8
  config.exact_steps = 30
  config.sampled_steps = 40
  config.lbfgs_steps = 300
  config.adam_steps = 500
  config.adam_rates = (0.01, 0.03, 0.1, 0.3)
  # Errors over the first at which steps are counted: as far as 1e-8.
  config.decades = 8

  # Errors of sampled Hessians.
  config.sketch_rows_per_dim = (20, 80, 320)
  config.sketch_draws = 20

  # Seconds of a step; sampled ones of 16 d rows.
  config.timed_rows_per_dim = 16
  config.lengths, config.dim_of_lengths = (
    (10_000, 40_000, 100_000, 400_000),
    128,
  )
  config.dims, config.length_of_dims = (32, 64, 128, 256, 512), 100_000
  config.rounds = 2
  config.seconds_per_point = 0.3

  # What the theory says, and does not: n and d of the regularized instance, of
  # random Hessians, and how far starts lie from the minimum.
  config.theory_length, config.theory_dim = 2000, 10
  config.random_length, config.random_dim, config.num_random = 20, 3, 400
  config.start_distance, config.num_starts = 1.0, 20

  # Mean digits: cosines of so many frequencies a side as features.
  config.frequencies, config.residual_scales = (4, 6), (0.0, 1.0)
  config.digit_weight = 1e-3
  config.digit_steps = 300

  # Several targets over the same features, in float32.
  config.targets_length, config.targets_dim = 20_000, 32
  config.num_targets = 32
  config.targets_rtol = 1e-4

  config.accepted = ml_collections.ConfigDict()
  config.accepted.order = (1.6, 2.6)
  config.accepted.factor = (0.5, 2.0)
  config.accepted.r_squared = 0.98
  config.accepted.law = (0.65, 1.35)
  config.accepted.law_slope = (-0.62, -0.42)
  config.accepted.sampled_slope = 1.3
  config.accepted.exact_slope = 1.6
  config.accepted.digits_converged = 10
  config.accepted.indefinite = 0.25

  if tier == "smoke":
    config.length, config.dim = 1000, 4
    config.rows_per_dim, config.num_seeds = (32,), 2
    config.sampled_steps, config.lbfgs_steps, config.adam_steps = 24, 20, 20
    config.adam_rates, config.decades = (0.1,), 6
    config.sketch_rows_per_dim, config.sketch_draws = (20, 80, 160), 4
    config.lengths, config.dim_of_lengths = (100, 200, 400), 4
    config.dims, config.length_of_dims = (2, 4, 8), 200
    config.timed_rows_per_dim, config.rounds = 4, 1
    config.seconds_per_point = 0.0
    config.theory_length, config.theory_dim = 200, 4
    config.num_random, config.num_starts = 40, 4
    config.frequencies, config.digit_steps = (2,), 60
    config.residual_scales = (1.0,)
    config.targets_length, config.targets_dim, config.num_targets = 200, 4, 3
  elif tier == "full":
    config.length, config.dim = 1_000_000, 256
    config.targets_length, config.targets_dim = 4_000_000, 1024
    config.num_seeds = 2
    config.lengths = (100_000, 400_000, 1_000_000, 4_000_000)
    config.dims, config.length_of_dims = (128, 256, 512, 1024), 1_000_000
    config.rounds = 10
  return config
