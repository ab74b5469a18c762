"""Flows that forecast: approximation, generalization, efficiency, real series.

  python -m experiments.flow_matching_tsf \
    --config=configs/flow_matching_tsf.py:cpu --workdir=/tmp/flow

cpu, 2 cores that nothing else uses: about four minutes. Expect the excess loss
to fall with the size of the model to 0.6 % of the least loss; with 256 windows
the polynomial regularizer to take off 36 % of it, and with 2048 windows a
weight of 10 to cost more than it gains; Euler's method to be of order 1, the
midpoint rule of 3 (on Gaussians) and Runge and Kutta's method of 4. "not
reproduced": on the temperature the continuous ranked probability score is 1.06
times that of N-Linear with Gaussian residuals, where at most 1 is accepted.
smoke: seconds, decides nothing. full, one accelerator, not run yet: a
transformer of base size, 100 000 windows.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "flow-matching-tsf"
  config.tier = tier
  config.seed = 0

  # Series that are polynomials with normal coefficients, and noise.
  config.history, config.horizon = 12, 12
  config.degree, config.noise = 2, 0.3
  config.num_eval = 8192

  # Approximation: by width of a network of two hidden layers, with its learning
  # rate, and by steps of one width, on more windows than are seen twice.
  config.num_windows = 65_536
  config.batch_size = 256
  config.widths = ((8, 3e-3), (32, 3e-3), (128, 3e-3), (512, 1e-3))
  config.num_steps, config.size_seeds = 3000, 3
  config.steps, config.width_of_steps = (100, 300, 1000), 128
  # A transformer: width, layers, heads; its steps and learning rate.
  config.dit, config.dit_mode = (64, 3, 4), "joint"
  config.dit_steps, config.dit_rate = 800, 2e-3
  config.dit_dtype = "float32"

  # Generalization: windows, weights of the regularizer.
  config.lengths = (32, 256, 2048)
  config.weights = (0.0, 1.0, 10.0)
  config.data_steps, config.data_seeds = 1500, 3
  config.data_width, config.data_rate = 128, 3e-3
  config.num_histories, config.num_samples = 128, 64

  # Efficiency: evaluations of the velocity, a multiple of 4; tolerances.
  config.evaluations = (4, 8, 16, 32, 64, 128, 256, 512)
  config.fit_from = 128
  config.tolerances = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
  config.num_paths = 256
  config.reference_steps = 512

  # Real series: name, history, horizon, period.
  config.series = (
    ("tmy3", 96, 24, 24),
    ("co2", 104, 26, 52),
    ("taylor", 336, 48, 336),
  )
  config.real_weights = (0.0, 0.03, 0.3)
  config.real_width, config.real_rate = 256, 1e-3
  config.real_steps, config.real_batch, config.num_evals = 1500, 128, 15
  # Steps between windows that are evaluated, samples of each.
  config.stride, config.real_samples = 12, 50
  # Of the series that the figure shows.
  config.shown = "tmy3"

  config.accepted = ml_collections.ConfigDict()
  config.accepted.excess = 0.02
  # In standard errors: of a rise from one size to the next, and of the loss
  # over what theory says.
  config.accepted.rise, config.accepted.gap = 3.0, (-4.0, 4.0)
  config.accepted.gain = 0.3
  config.accepted.best_weight = 1.0
  config.accepted.euler = (-1.1, -0.9)
  config.accepted.midpoint = -2.0
  config.accepted.rk4 = (-4.3, -3.7)
  config.accepted.exact = 1e-12
  config.accepted.crps = 1.0

  if tier == "smoke":
    config.num_eval, config.num_windows = 256, 256
    config.widths = ((4, 3e-3), (8, 3e-3))
    config.batch_size = 32
    config.num_steps, config.size_seeds = 20, 2
    config.steps, config.width_of_steps = (), 8
    config.dit, config.dit_steps = (8, 1, 2), 5
    config.lengths, config.weights = (32, 256), (0.0, 1.0)
    config.data_steps, config.data_seeds, config.data_width = 20, 1, 8
    config.num_histories, config.num_samples = 8, 8
    config.evaluations, config.fit_from = (4, 8, 16), 4
    config.tolerances, config.num_paths = (1e-2,), 8
    config.reference_steps = 32
    config.series = (("co2", 8, 4, 4),)
    config.shown = "co2"
    config.real_weights, config.real_width = (0.0, 0.3), 8
    config.real_steps, config.real_batch, config.num_evals = 20, 16, 2
    config.stride, config.real_samples = 100, 8
  elif tier == "full":
    config.num_windows, config.batch_size = 100_000, 1024
    config.widths = (*config.widths, (1024, 1e-3))
    config.num_steps = 20_000
    config.dit, config.dit_steps = (384, 12, 6), 20_000
    config.dit_rate = 3e-4
    config.dit_dtype = "bfloat16"
    config.real_steps, config.real_width = 20_000, 1024
    config.stride, config.real_samples = 1, 100
  return config
