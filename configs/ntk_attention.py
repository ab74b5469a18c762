"""NTK-Attention: a prefix of any length as one small state.

  python -m experiments.ntk_attention \
    --config=configs/ntk_attention.py:cpu --workdir=/tmp/ntk_attention

cpu, 2 cores: a few minutes. Trained prefix columns move by m^-0.5 and their
tangent kernel by m^-1.5; outputs of Taylor states stay far below their bound at
every length. Expect "not reproduced" all the same: on digits a trained state
adapts the encoder better than its last layer alone, but worse, by more than a
point, than a trained prefix of 16 tokens. smoke: seconds, decides nothing.
full, one accelerator, minutes: more columns, longer prefixes, more runs.
--config.parts selects among "training", "approximation" and "tuning"; with
fewer than three the verdict is about those alone.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "ntk-attention"
  config.tier = tier
  config.seed = 0
  config.parts = ("training", "approximation", "tuning")

  # Training of a tied prefix on num_data random unit vectors in dim dimensions.
  config.dim = 4
  config.num_data = 6
  config.columns = (64, 256, 1024, 4096, 16384)
  config.num_seeds = 4
  config.num_steps = 200
  # Slopes are fitted from here on: below, training is not lazy yet.
  config.fit_from = 256
  # Steps of rate / lambda_max of each rate, with this many columns.
  config.rates = (1.0, 1.9, 2.5)
  config.rate_columns = 512
  config.rate_steps = 60

  # Outputs of a state against those of its prefix.
  config.lengths = (2, 8, 32, 128, 512, 2048, 8192, 16384)
  # Sizes of a head, and the degrees of Taylor features tried with each.
  config.head_dims = (64, 16)
  config.degrees = ((1, 2), (1, 2, 3, 4))
  config.num_queries = 128
  config.num_keys = 128
  config.num_fit_queries = 512
  config.radius = 0.67  # of uniform entries: logits of spread 0.15
  config.favor_features = 1024

  # A small encoder, trained on digits 0-4, adapted to 5-9.
  config.num_heads = 4
  config.head_dim = 16
  config.num_layers = 2
  config.pretrain_steps = 400
  config.tune_steps = 300
  config.batch_size = 64
  config.pretrain_rate = 2e-3
  # Each method takes the rate that is best on images held out for that.
  config.tune_rates = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
  config.tune_seeds = 5
  config.lora_rank = 8
  config.prefix_lengths = (16, 64)
  config.state_rank = 4
  # Drawn pairs whose mean a state starts from, as many as its rank at least.
  # With "elu" this weighs about as much as head_dim tokens of the context.
  config.state_start = 4

  config.accepted = ml_collections.ConfigDict()
  config.accepted.move_slope = (-0.65, -0.4)
  config.accepted.kernel_slope = (-2.0, -0.9)
  config.accepted.log_loss_gap = (0.0, 1e-3)
  config.accepted.kernel_ratio = (10.0, 1e6)
  config.accepted.bound = (0.0, 1.0)
  config.accepted.growth = (0.0, 1.0)
  # In points of accuracy.
  config.accepted.over_prefix = (-1.0, 100.0)
  config.accepted.over_head = (1e-6, 100.0)

  if tier == "smoke":
    config.columns = (32, 64, 128)
    config.fit_from = 32
    config.num_seeds = 2
    config.num_steps = 10
    config.rate_columns, config.rate_steps = 32, 5
    config.lengths = (4, 16)
    config.head_dims, config.degrees = (8,), ((1, 2),)
    config.num_queries = config.num_keys = 16
    config.num_fit_queries = 32
    config.favor_features = 64
    config.pretrain_steps = config.tune_steps = 3
    config.tune_rates = (1e-2, 3e-2)
    config.tune_seeds = 2
    config.num_heads, config.head_dim, config.num_layers = 2, 8, 1
    config.prefix_lengths = (4,)
  elif tier == "full":
    config.columns = tuple(4**i for i in range(3, 10))
    config.num_seeds = 16
    config.num_data = 16
    config.dim = 8
    config.lengths = tuple(4**i for i in range(1, 10))
    config.pretrain_steps = config.tune_steps = 2000
    config.tune_seeds = 10
  return config
