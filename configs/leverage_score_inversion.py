"""Inverting leverage scores: rates of two methods, recovery, noise and time.

  python -m experiments.leverage_score_inversion \
    --config=configs/leverage_score_inversion.py:cpu --workdir=/tmp/leverage

cpu, 2 cores that nothing else uses: about two minutes, much of it compilation.
Expect "reproduced": Newton's method converges quadratically and gradient
descent linearly, by 1 - least / largest eigenvalue a step; points at 70 % of
the way to the wall are recovered from the analytic center in at least 95 % of
all polytopes, and near the wall, by Newton's method, from sixteen starts;
errors are proportional to the noise of the scores; seconds of a Hessian grow
like n. smoke: seconds, decides nothing. full, one accelerator, not run yet:
n = 1e6, d = 64 by conjugate gradients.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "leverage-score-inversion"
  config.tier = tier
  config.seed = 0
  # Wall clock decides: nothing else may run beside this experiment.
  config.timed = True

  # Convergence, for pairs (n, d), of a point at this share of the way to the
  # wall, from the analytic center; pure steps and those of fixed size from
  # points near the solution.
  config.sizes = ((60, 5), (60, 20), (1000, 5), (1000, 20))
  config.share = 0.7
  config.linear_solver = "cholesky"
  config.newton_steps = 20
  config.descent_steps, config.descent_every = 1000, 20
  config.pure_distance, config.pure_steps = 0.05, 8
  config.fixed_distance, config.fixed_steps = 1e-4, 150
  # One of them, (60, 20), is where the whole Hessian leads astray.
  config.shown = ((60, 5), (60, 20), (1000, 20))

  # Recovery by share of the way to the wall: with the whole Hessian, from one
  # and from several starts, and with its Gauss-Newton part, from one.
  config.recovery_size = (60, 5)
  config.shares = (0.5, 0.7, 0.9, 0.95, 0.97, 0.99)
  config.num_starts = 16
  config.num_polytopes = 60
  config.recovered_within = 1e-8
  # Scipy's solver, from the same start, for the first of them.
  config.num_scipy = 30

  # Multiplicative noise of the scores.
  config.noise_size = (1000, 20)
  config.noise = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
  config.noise_seeds = 5
  # Weights of the regularizer, each half of the one before.
  config.weights = (1e-3, 5e-4)

  # Rows and columns of the diabetes table.
  config.table_size = (442, 10)

  # Seconds of a Hessian.
  config.lengths, config.dim_of_lengths = (8000, 16_000, 32_000, 64_000), 20
  config.dims, config.length_of_dims = (8, 16, 32, 64), 8000
  config.rounds = 3
  config.seconds_per_point = 0.5

  config.accepted = ml_collections.ConfigDict()
  config.accepted.order = (1.6, 2.6)
  # Factor of gradient descent over what eigenvalues say, as a difference.
  config.accepted.factor = (-0.02, 0.02)
  config.accepted.recovered = 0.95
  # The specified 28 of 30.
  config.accepted.recovered_near = 0.93
  config.accepted.noise_slope = (0.9, 1.1)
  config.accepted.bias_ratio = (3.6, 4.4)
  config.accepted.real_error = 1e-8
  config.accepted.length_slope = (0.8, 1.2)
  config.accepted.dim_slope = 3.2

  if tier == "smoke":
    config.sizes = config.shown = ((40, 3),)
    config.newton_steps, config.descent_steps = 12, 40
    config.fixed_steps = 5
    config.recovery_size, config.shares = (40, 3), (0.7, 0.97)
    config.num_starts, config.num_polytopes, config.num_scipy = 4, 4, 2
    config.noise_size, config.noise = (40, 3), (1e-6, 1e-5, 1e-4)
    config.noise_seeds = 2
    config.table_size = (40, 3)
    config.lengths, config.dim_of_lengths = (100, 200, 400), 3
    config.dims, config.length_of_dims = (2, 3, 4), 100
    config.rounds, config.seconds_per_point = 1, 0.0
  elif tier == "full":
    config.sizes = config.shown = ((100_000, 20), (1_000_000, 64))
    config.linear_solver = "cg"
    config.num_polytopes = 1000
    config.lengths = (10_000, 100_000, 1_000_000)
    config.dims, config.length_of_dims = (16, 32, 64, 128), 100_000
    config.rounds = 10
  return config
