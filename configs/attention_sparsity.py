"""Gaussian attention sparsity: budgets n^C against budgets of O(log n).

  python -m experiments.attention_sparsity \
    --config=configs/attention_sparsity.py:cpu --workdir=/tmp/sparsity

cpu, 2 cores: about a minute. Expect "reproduced": half-mass budgets grow like
n^C with slopes .84, .62, .42, .25 for spreads s sqrt(log n), s = .5, .8, 1, 1.2
(limits 1 - s^2/2 = .875, .68, .5, .28), less than n^0.1 for s = 1.6, and
the error of k = n^0.8 falls where that of 16 and of 4 log n rises. smoke:
seconds, decides nothing. full, one accelerator, minutes: the same to n = 2^24
(logits) and 2^16 (attention).
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "attention-sparsity"
  config.tier = tier
  config.seed = 1

  # Half-mass budgets of rows of n logits of spread s sqrt(log n).
  config.spreads = (0.5, 0.8, 1.0, 1.2)
  config.lengths = tuple(2**i for i in range(12, 19))
  config.logits_per_length = 2**25
  config.max_rows = 4096

  # Above sqrt(2) a few logits hold the mass: the budget of one row scatters by
  # as much as its mean, and 4096 rows give a slope to about 0.004.
  config.frozen_spreads = (1.6,)
  config.frozen_rows = 4096

  # Tail masses at one spread: budgets n^0.8, 64 and 4 log n.
  config.tail_spread = 1.2
  config.tail_lengths = (2**10, 2**13, 2**16)
  config.tail_rows = (200, 200, 60)

  # Output error of top-k attention; spread 0 stands for a fixed sigma of 1.
  config.attention_spreads = (0.0, 0.5, 1.0, 1.5)
  config.attention_lengths = (2**8, 2**10, 2**12, 2**14)
  config.budgets = ("16", "4 log n", "n^0.5", "n^0.7", "n^0.8", "n/4")
  config.num_queries = 64
  config.num_heads = 4

  # Weights above t / n.
  config.sigmas = (0.5, 1.0, 2.0)
  config.levels = tuple(2.0 ** (i / 2) for i in range(-6, 15))
  config.level_length = 2**14

  # Attention rows of MiniLM on English text.
  config.num_texts = 32
  config.num_tokens = 128
  config.top = 8

  config.accepted = ml_collections.ConfigDict()
  config.accepted.slope_error = (-0.03, 0.03)
  config.accepted.frozen_slope = 0.1
  config.accepted.falling = (0.0, 1.0)
  config.accepted.rising = (1.0, 100.0)
  config.accepted.tail_ratio = (2.0, 100.0)
  config.accepted.certificate = (0.0, 1.0)

  if tier == "smoke":
    config.lengths = (2**8, 2**9, 2**10)
    config.logits_per_length = 2**13
    config.frozen_rows = 8
    config.tail_lengths = (2**8, 2**9, 2**10)
    config.tail_rows = (10, 10, 10)
    config.attention_spreads = (0.0, 1.0)
    config.attention_lengths = (2**6, 2**8)
    config.budgets = ("16", "4 log n", "n^0.8")
    config.num_queries, config.num_heads = 8, 1
    config.level_length = 2**10
    config.num_texts, config.num_tokens = 2, 32
  elif tier == "full":
    config.lengths = tuple(2**i for i in range(12, 25))
    config.logits_per_length = 2**30
    config.max_rows = 16384
    config.frozen_rows = 8192
    config.attention_lengths = tuple(2**i for i in range(8, 17))
    config.num_queries = 256
    config.num_texts = 256
  return config
