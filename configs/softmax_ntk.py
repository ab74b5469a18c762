"""Two-layer softmax networks: lazy training, kernels, and a score to learn.

  python -m experiments.softmax_ntk \
    --config=configs/softmax_ntk.py:cpu --workdir=/tmp/softmax_ntk

cpu, 2 cores: a minute, much of it eigenvalues of 3000 rows in float64.
Expect "not reproduced": the kernel changes like m^-2, less than is accepted.
Outputs come near those of the limit like m^-0.4, weights move like 1/m, the
kernel of the softmax is never conditioned worse than that of the exponential, a
denoiser that stops early has an error that falls with the pairs it saw, and a
network of 4096 neurons trained to the same time comes near to it. smoke:
seconds, decides nothing. full, one accelerator, not run yet: widths to 2^18 on
4096 data, 32 seeds, a mixture of 32 modes in 16 dimensions.
"""

import ml_collections
from ml_collections import config_dict


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "softmax-ntk"
  config.tier = tier
  config.seed = 0

  # Training against the limit, on unit vectors.
  config.lazy_data, config.dim, config.num_outputs = 24, 8, 2
  config.num_test = 64
  # Data whose C are held at a time for a kernel; None = all.
  config.kernel_chunk = config_dict.placeholder(int)
  config.widths = (64, 128, 256, 512, 1024, 2048, 4096)
  config.num_seeds = 8
  config.num_steps = 500

  # Kernels of the limit, of inputs whose norms differ.
  config.num_data = 24
  config.norms = (0.3, 1.0)
  config.num_draws = 20
  config.target_loss = 1e-6

  # Perturbations of the weights of one network.
  config.perturbed_width = 4096
  config.radii = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
  config.num_directions = 8
  config.adversarial_width, config.adversarial_data = 256, 8
  config.adversarial_radii = (1e-3, 0.5)

  # Denoisers of a mixture of modes at vectors of signs, two a dimension, which
  # is a power of two: in the plane (+-1, +-1).
  config.mixture_dim, config.mixture_std = 2, 0.2
  config.t_min, config.t_max = 0.05, 3.0
  config.num_pairs = (250, 500, 1000, 2000, 3000)
  config.pair_seeds = 2
  config.num_val, config.num_oracle = 1000, 4000
  config.interpolated_pairs = 1000
  # Networks; one of the widths decides.
  config.network_widths, config.network_width = (1024, 4096, 16384), 4096
  config.network_pairs, config.network_seeds = 250, 5
  config.num_samples, config.sampler_steps = 2000, 100

  # Digits: pairs of train, validation; the rest are for the test.
  config.digits_train, config.digits_val = 1000, 300

  config.accepted = ml_collections.ConfigDict()
  config.accepted.fn_slope = (-0.6, -0.35)
  config.accepted.move_slope = (-1.2, -0.9)
  config.accepted.kernel_slope = (-1.5, -0.8)
  # Of draws: the share in which the softmax is not worse.
  config.accepted.not_worse = 1.0
  config.accepted.lipschitz_slope = (0.95, 1.05)
  config.accepted.relu_slope = 0.8
  config.accepted.bound = 1.0
  config.accepted.score_slope = (-0.8, -0.4)
  config.accepted.over_interpolation = 0.35
  config.accepted.network_gap = 0.15

  if tier == "smoke":
    config.num_data, config.lazy_data = 6, 6
    config.dim, config.num_test = 4, 8
    config.widths, config.num_seeds = (16, 32, 64, 128), 2
    config.num_steps = 20
    config.num_draws = 2
    config.perturbed_width, config.radii = 64, (1e-2, 1e-1, 1.0)
    config.num_directions = 2
    config.num_pairs, config.pair_seeds = (20, 30, 40), 1
    config.num_val, config.num_oracle = 30, 50
    config.interpolated_pairs = 20
    config.adversarial_width, config.adversarial_data = 16, 3
    config.network_widths, config.network_width = (32,), 32
    config.network_pairs, config.network_seeds = 20, 1
    config.num_samples, config.sampler_steps = 40, 5
    config.digits_train, config.digits_val = 60, 40
  elif tier == "full":
    config.widths = tuple(2**i for i in range(6, 19))
    config.num_seeds = 32
    config.lazy_data, config.kernel_chunk = 4096, 256
    config.mixture_dim = 16
    config.num_pairs = (250, 500, 1000, 2000, 4096)
    config.pair_seeds = 8
    config.digits_train = 1200
  return config
