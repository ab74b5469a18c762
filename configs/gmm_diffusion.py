"""Diffusion of Gaussian mixtures: smoothness, solvers, dimension, a network.

  python -m experiments.gmm_diffusion \
    --config=configs/gmm_diffusion.py:cpu --workdir=/tmp/gmm

cpu, one core that nothing else uses: about three minutes, half of them
compilation; 2 cores take less. Expect "reproduced": the Lipschitz bound of
the worst mixtures is flat in the number of components, and no slope is above;
solvers have their orders 1, 2 and 3, correctors order 1 and no gain on a line;
"ddpm" has a total variation like 1/N, a KL divergence of samples like N^-1.9
and of paths like 1/N, below its bound; evaluations for a given total variation
grow with the dimension by an exponent below 1.1; divergence grows like the
square of the error of the score. And what the claim does not say: with
different covariances the score has no Lipschitz constant.
smoke: seconds, decides nothing. full, one accelerator, not run yet: clouds of
1e5 samples in 3072 dimensions, 1000 components.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "gmm-diffusion"
  config.tier = tier
  config.seed = 0

  # Orders: of end points, on a mixture of 4 in the plane.
  config.order_methods = (
    "euler", "ei", "dpm1", "heun", "dpm2", "dpmpp2m", "dpm3",
  )  # fmt: skip
  config.order_steps = (16, 32, 64, 128, 256, 512)
  config.order_points, config.order_reference = 200, 4096
  config.order_span = (0.01, 5.0)

  # Exact laws, of two components on a line. Methods of order 2 start later, or
  # what is left of the data in the noise hides their slope.
  config.line_weights = (0.3, 0.7)
  config.line_means, config.line_variances = (-2.0, 1.5), (0.25, 0.49)
  config.t_max = 5.0
  config.line_methods = ("ddpm", "ei", "euler")
  config.line_steps = (25, 50, 100, 200, 400)
  config.ei_steps = (16, 32, 40, 64, 80, 120, 256)
  # Nor do methods in the log-SNR reach the data.
  config.long_methods = ("dpm1", "heun", "dpm2", "dpmpp2m", "dpm3")
  config.long_span = (0.1, 10.0)
  config.long_steps = (64, 96, 128, 192, 256)
  # Correctors: blocks of them, steps in a block, and where they are compared.
  config.line_blocks, config.line_multiples = (10, 20), (2, 4, 8, 16)
  config.line_evaluations, config.line_samples = 120, 200_000

  # Divergence of paths, of N(0, v).
  config.path_variances = (0.1, 0.5)
  config.path_steps = (100, 200, 400, 800)

  # Smoothness by the number of components of N(mean, v I), means in a ball; and
  # steps to the worst of these mixtures.
  config.components = (1, 2, 4, 16, 64, 256)
  config.smooth_dim, config.smooth_radius = 4, 2.0
  config.smooth_variance, config.smooth_time = 0.25, 0.1
  config.smooth_points = 4000
  config.ascent_steps, config.ascent_rate = 1000, 0.05
  # Points (q, q) for covariances diag(1, 4) and diag(4, 1).
  config.distances = (1.0, 3.0, 10.0, 30.0, 100.0)

  # Evaluations that reach a total variation, by dimension, on N(0, v I).
  config.dims = (2, 4, 8, 16, 32, 64, 128, 256)
  config.chain_variance, config.chain_t_max = 0.25, 4.0
  config.chain_tv = 0.05
  config.chain_multiples = (1, 2, 4, 8, 16, 32, 64, 128)

  # Errors of the score.
  config.score_errors = (0.05, 0.1, 0.2, 0.4)
  config.error_steps = 400

  # Clouds of samples.
  config.cloud_dims = (2, 16, 64)
  config.cloud_components, config.cloud_samples = 8, 20_000
  config.cloud_batch, config.cloud_pairs = 1000, 4000
  config.cloud_evaluations = (12, 24, 48, 96)
  config.cloud_methods = (
    "ddpm", "ei", "euler", "dpm1", "heun", "dpm2", "dpmpp2m", "dpm3", "dpom",
    "dpum",
  )  # fmt: skip
  # Of correctors.
  config.cloud_blocks = 6
  config.cloud_span = (0.005, 8.0)
  config.num_projections = 64

  # Digits in their principal axes, and a network for their mixture's score.
  config.digits_dim, config.digits_components = 16, 20
  config.network_width, config.train_steps = 256, 3000
  config.batch_size, config.learning_rate = 512, 2e-3
  config.network_span = (0.01, 5.0)
  config.network_times = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
  config.error_samples = 100_000
  config.digits_samples, config.digits_steps = 10_000, 40

  config.accepted = ml_collections.ConfigDict()
  config.accepted.order_1 = (0.9, 1.1)
  config.accepted.order_2 = (1.85, 2.15)
  config.accepted.order_3 = (2.85, 3.15)
  config.accepted.tv_slope = (-1.05, -0.95)
  # Densities that are too large here and too small there cancel in no power.
  config.accepted.tv_slope_2 = (-2.3, -1.7)
  config.accepted.tv_slope_3 = (-3.3, -2.7)
  # Of a sampled total variation, in those of as many draws from the target.
  config.accepted.sampled = 1.0
  config.accepted.kl_slope = (-2.0, -1.8)
  config.accepted.path_slope = (-1.05, -0.9)
  # Maxima over minima.
  config.accepted.flat = 1.01
  # Growth over ten times the distance.
  config.accepted.crossing = (95.0, 110.0)
  config.accepted.exponent = 1.1
  config.accepted.error_slope = (0.9, 1.1)
  # Distances over that of two draws.
  config.accepted.cloud = 1.5
  # Error of the network by two losses over that by the oracle.
  config.accepted.losses = (0.9, 1.1)

  if tier == "smoke":
    config.order_methods = ("ei", "dpm3")
    config.order_steps, config.order_points = (16, 32), 10
    config.order_reference = 128
    config.line_methods = ("ddpm", "ei")
    config.line_steps, config.ei_steps = (10, 20, 40), (10, 20, 40)
    config.long_methods, config.long_steps = ("heun",), (10, 20, 40)
    config.line_blocks, config.line_multiples = (5,), (1, 2, 4)
    config.line_evaluations, config.line_samples = 10, 1000
    config.path_steps = (25, 50, 100)
    config.components, config.smooth_points = (1, 2, 8), 100
    config.dims, config.chain_multiples = (2, 4, 8), (1, 2, 4, 8, 16)
    config.score_errors, config.error_steps = (0.1, 0.2, 0.4), 20
    config.cloud_dims, config.cloud_samples = (2,), 500
    config.cloud_batch, config.cloud_pairs = 250, 100
    config.cloud_evaluations, config.cloud_methods = (12,), ("dpmpp2m",)
    config.num_projections = 4
    config.digits_dim, config.digits_components = 2, 2
    config.network_width, config.train_steps, config.batch_size = 8, 20, 16
    config.network_times, config.error_samples = (0.1, 1.0), 200
    config.digits_samples, config.digits_steps = 200, 10
  elif tier == "full":
    config.cloud_dims, config.cloud_components = (64, 3072), 1000
    config.cloud_samples, config.cloud_batch = 100_000, 100
    config.cloud_pairs, config.num_projections = 20_000, 256
    config.digits_dim, config.digits_components = 32, 50
    config.network_width, config.train_steps = 1024, 50_000
    config.digits_samples, config.error_samples = 100_000, 1_000_000
  return config
