"""Regression with one head of attention, both of its weights unknown.

  python -m experiments.attention_regression \
    --config=configs/attention_regression.py:cpu --workdir=/tmp/regression

cpu, 2 cores that nothing else uses: about three minutes. Expect "reproduced":
steps of the sampled method grow linearly in log(1 / epsilon) (R^2 above 0.98),
those of the joint method are quadratic near a minimum (orders 1.6 to 2.6), and
a step takes time n^1.7 to n^2.2. smoke: seconds, decides nothing. full, one
accelerator, not run yet: n = 16384 and d = 64 by products with the Hessian, all
of it in float32.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "attention-regression"
  config.tier = tier
  config.seed = 0
  # Wall clock decides: nothing else may run beside this experiment.
  config.timed = True
  config.dtype = "float64"
  config.rounds = 2

  # Planted heads: outputs with 1 % noise, both ridges, and a start at this
  # distance from the planted X, with the best Y for it.
  config.noise = 0.01
  config.ridge = 1e-3
  config.distance = 0.3

  # Convergence of all methods on one head.
  config.methods = ("joint", "varpro", "greedy", "sketched")
  config.length, config.dim = 1024, 4
  config.linear_solver = "cholesky"
  config.max_steps = 100
  config.first_order_steps = 300
  config.step_size = 2e-2

  # Rates, over several heads: of the sampled method while the gradient falls
  # from 10^-first to 10^-decades of what it was; of the joint one, without
  # damping, from this distance to the minimum.
  config.rate_length, config.rate_dim = 1024, 4
  config.rate_seeds = 5
  config.first_decade, config.decades = 2, 8
  config.near = 0.03

  # Seconds of a step. The slope over all lengths decides, that from one on is
  # reported.
  config.cost_lengths, config.cost_dim = (256, 512, 1024, 2048, 4096), 8
  config.slope_from = 1024
  config.cost_dims, config.cost_length = (4, 8, 16, 32), 512

  # Random starts, by rows for each dimension.
  config.ratios = (8, 16, 32, 64)
  config.start_dim = 4
  config.heads = 3
  config.num_starts = 32
  config.start_steps = 200
  config.stationary = 1e-6

  # The next row of pixels of a digit, from the rows so far.
  config.images = 64
  config.digits_ridge = 1.0
  config.digits_steps = 40
  config.digits_first_order_steps = 500

  config.accepted = ml_collections.ConfigDict()
  config.accepted.linearity = 0.98
  config.accepted.order = (1.6, 2.6)
  config.accepted.length_slope = (1.7, 2.2)
  config.accepted.stationary = 0.9

  if tier == "smoke":
    config.methods = ("joint", "sketched")
    config.length, config.dim = 96, 2
    config.max_steps = 30
    config.first_order_steps = 10
    config.rate_length, config.rate_dim = 96, 2
    config.rate_seeds, config.first_decade, config.decades = 1, 1, 3
    config.rounds = 1
    config.cost_lengths, config.cost_dim = (32, 64, 96), 2
    config.slope_from = 32
    config.cost_dims, config.cost_length = (2, 3), 32
    config.ratios, config.start_dim = (8,), 2
    config.heads, config.num_starts, config.start_steps = 1, 2, 20
    config.images = 4
    config.digits_steps = 4
    config.digits_first_order_steps = 10
  elif tier == "full":
    config.dtype = "float32"
    # A matrix of 8192 rows would be formed, and half of it for a sample.
    config.methods = ("joint", "varpro", "greedy")
    config.length, config.dim = 16384, 64
    config.linear_solver = "cg"
    config.rate_length, config.rate_dim = 16384, 16
    config.decades = 4
    config.cost_lengths = (1024, 2048, 4096, 8192, 16384)
    config.slope_from = 4096
    config.ratios = (8, 16, 32, 64, 128)
    config.heads, config.num_starts = 10, 64
    config.images = 256
  return config
