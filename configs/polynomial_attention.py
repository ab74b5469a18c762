"""Polynomial attention: almost linear time under bounded logits, and its error.

  python -m experiments.polynomial_attention \
    --config=configs/polynomial_attention.py:cpu --workdir=/tmp/polynomial

cpu, 2 cores that nothing else uses: five minutes, most of it exact attention
and compilation. Expect "reproduced": times of polynomial attention grow like n
(slopes 0.85 to 1.2 from n = 4096 on) and exact ones like n^2 (1.8 to 2.3), no
error is above its bound, the square of the largest B is a straight line in
log n, and each two degrees more make the gradient at least ten times better.
smoke: seconds, decides nothing. full, one accelerator, minutes: times to
n = 2^20.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "polynomial-attention"
  config.tier = tier
  config.seed = 0
  # Wall clock decides: nothing else may run beside this experiment.
  config.timed = True

  # Times of one head: pairs (H, degree), with 45 to 2145 features.
  config.sizes = ((4, 4), (8, 2), (8, 4), (16, 2), (32, 2), (64, 2))
  config.causal_sizes = ((8, 2), (64, 2))
  config.lengths = tuple(2**i for i in range(9, 16))
  # Polynomial attention alone, while n m features are no more than that: at
  # lengths where a call of few features takes more than its fixed cost.
  config.long_lengths = (2**17, 2**20)
  config.long_features = 3e8
  # Slopes, causal calls and gradients: from here on.
  config.slope_from = 2**12
  config.rounds = 2
  config.seconds_per_point = 0.3
  config.shown = (16, 2)

  # Error against the bound: entries of query and key are uniform on [-B, B],
  # logits are divided by H as in the paper, so that they stay within B^2.
  config.bounds = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
  config.degrees = (2, 4, 6, 8)
  config.error_length = 1000
  config.error_dim = 4

  # The largest B with C(log2 n + g, g) <= n features, by error asked for.
  config.eps = (0.1, 0.01)
  config.exponents = (3, 32)

  # Gradients: entries uniform on [-1, 1].
  config.gradient_length = 2000
  config.gradient_dim = 3

  config.accepted = ml_collections.ConfigDict()
  config.accepted.linear_slope = (0.85, 1.2)
  config.accepted.quadratic_slope = (1.8, 2.3)
  config.accepted.error_over_bound = (0.0, 1.0)
  config.accepted.limit_r_squared = 0.99
  config.accepted.gradient_gain = 10.0
  config.accepted.surrogate_over_closed = (0.0, 1.0)

  if tier == "smoke":
    config.sizes = config.causal_sizes = ((8, 2),)
    config.lengths, config.long_lengths = (2**5, 2**6, 2**7), (2**8,)
    config.slope_from = 2**5
    config.rounds, config.seconds_per_point = 1, 0.0
    config.shown = (8, 2)
    config.bounds = (0.5, 1.0)
    config.degrees = (2, 4)
    config.error_length = 100
    config.exponents = (3, 18)
    config.gradient_length = 100
  elif tier == "full":
    config.causal_sizes = config.sizes
    config.lengths = tuple(2**i for i in range(10, 21))
    config.long_lengths = ()
    config.slope_from = 2**15
    config.rounds = 5
    config.error_length = 20000
    config.gradient_length = 20000
  return config
