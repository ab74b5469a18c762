"""Sign-inconsistent next steps: attention to scalars, and a linear rival.

  python -m experiments.asymmetric_tsf \
    --config=configs/asymmetric_tsf.py:cpu --workdir=/tmp/asymmetric

cpu, one core that nothing else uses: less than four minutes, half of them
compilation; 2 cores take less. Expect "reproduced": where the sign changes,
attention without positions has a risk of about 1.1, more than the forecast 0
and at least 25 times that of the linear residual network, 0.02, and never
gets below the permutation floor; all heads begin to move along their signs. A
bias of positions reaches 0.02, too. What is reported and decides nothing: of
gradient descent neither does the training risk fall to that of noise nor do
heads align with their signs, against theorem 5.2. smoke: seconds, decides
nothing. full, one accelerator, not run yet: 65536 heads, 512 lags.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "asymmetric-tsf"
  config.tier = tier
  config.seed = 0

  # The task, and the training of all models on it.
  config.dim, config.gamma, config.noise = 8, 0.5, 0.1
  config.num_train, config.num_eval = 4096, 20_000
  config.models = (
    "plain, signs fixed",
    "plain",
    "plain, weight decay",
    "residual",
    "differential",
    "rope",
    "patch",
    "position bias",
  )
  config.width = 128
  config.num_steps, config.batch_size = 2500, 256
  config.learning_rate, config.weight_decay = 2e-2, 1e-2
  config.patch_size = 2
  # Tasks and samples, each drawn anew.
  config.draws = 3

  # Gradient descent on few samples, as in the theory, by number of heads.
  config.descent_kinds = ("unit", "paper")
  config.descent_widths = (32, 256, 1024)
  config.descent_train, config.descent_eval = 128, 2000
  config.descent_steps, config.descent_every = 1000, 50
  config.descent_draws = 3
  config.drift_step = 200
  # What theorem 5.2 has in the end: a risk below any (here, that of noise), and
  # nearly all heads aligned.
  config.theorem_risk, config.theorem_aligned = 0.02, 0.9

  # One property of the task after the other. At d = 8 none is below -0.75.
  config.gammas = (-0.7, -0.35, 0.0, 0.35, 0.7, 0.9)
  config.dims = (3, 8, 16, 32, 64)
  config.noises = (0.03, 0.1, 0.3, 1.0)

  # Name, column, history, horizon and patch of real series.
  config.series = (
    ("co2", 0, 104, 26, 8),
    ("sunspots_monthly", 0, 132, 24, 12),
    ("tmy3", 0, 96, 24, 8),
    ("tmy3", 5, 96, 24, 8),
    ("taylor", 0, 336, 48, 24),
    ("elec_equip", 0, 48, 12, 4),
  )
  config.ridge = 1e-3
  config.forecasters = (
    "attention",
    "attention, residual",
    "differential, residual",
    "rope, residual",
    "position bias, residual",
  )
  config.forecaster_layers = 2
  config.forecaster_steps, config.forecaster_batch = 600, 64
  config.forecaster_rate, config.forecaster_decay = 3e-3, 1e-2
  # The one of these that is best on the validation part counts.
  config.forecaster_checks = 12

  config.accepted = ml_collections.ConfigDict()
  # Risk of attention over that of the linear residual network.
  config.accepted.ratio = 25.0
  # Risk less the floor, in standard errors.
  config.accepted.above_floor = -3.0
  # Risk of the remedy over that of the task's own coefficients.
  config.accepted.remedy = 1.3
  # Heads whose first step is along their sign.
  config.accepted.first_step = 1.0

  if tier == "smoke":
    config.dim, config.num_train, config.num_eval = 4, 64, 64
    config.models = ("plain, signs fixed", "plain", "position bias")
    config.width, config.num_steps, config.batch_size = 4, 4, 16
    config.draws = config.descent_draws = 1
    config.descent_widths = (4,)
    config.descent_train, config.descent_eval = 16, 16
    config.descent_steps, config.descent_every = 4, 2
    config.drift_step = 2
    config.gammas, config.dims, config.noises = (0.0, 0.5), (4,), (0.1,)
    config.series = (("elec_equip", 0, 12, 3, 6),)
    config.forecasters, config.forecaster_layers = ("attention",), 1
    config.forecaster_steps, config.forecaster_batch = 4, 8
    config.forecaster_checks = 2
  elif tier == "full":
    config.dim, config.num_train, config.num_eval = 512, 100_000, 4096
    config.width, config.num_steps, config.draws = 65_536, 5000, 1
    config.patch_size = 16
    config.descent_widths = (32, 256, 1024, 8192, 65_536)
    config.descent_draws = 20
    config.gammas = (-0.9, *config.gammas)
    config.dims = (3, 8, 32, 128, 512)
    config.forecaster_steps = 5000
  return config
