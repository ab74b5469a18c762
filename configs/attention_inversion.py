"""Input recovery from attention: what leaks, from what, and how exactly.

  python -m experiments.attention_inversion \
    --config=configs/attention_inversion.py:cpu --workdir=/tmp/inversion

cpu, 2 cores, two to four minutes, half of it compilation. "reproduced" if at
least three quarters of random starts find the tokens from weights and outputs,
by Gauss-Newton steps and a ridge that goes to 0, closed forms always do,
convergence is quadratic (order 1.6 to 2.6), and from the weights of one head
nothing is recovered, in as many directions as theory says. smoke: seconds,
decides nothing. full, one accelerator: 128 tokens of 64 dimensions, 256 starts,
by conjugate gradients.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "attention-inversion"
  config.tier = tier
  config.seed = 2024

  # Recovery: pairs (n, d); entries of T and V are N(0, 1), of W this times it.
  config.sizes = ((8, 4), (16, 4), (8, 8), (16, 8))
  config.weight_scale = 0.5
  # Tasks that decide: weights and outputs observed, random starts, ridges.
  # Fewer for all else, and of the other observations the first sizes only.
  config.num_tasks = 8
  config.num_starts = 16
  config.side_tasks = 2
  config.side_sizes = 3
  # Of the phases before the last, which has none.
  config.ridges = (0.1, 0.01)
  # Starts about the truth; after these come starts about 0, of radius 1.
  config.radii = (0.02, 0.1, 0.3)
  # What counts as recovered, and as a loss of zero.
  config.recovered = 1e-3
  config.zero_loss = 1e-20
  # Steps shown, from starts at radius 0.1.
  config.order_steps = 16

  # Nullity, with n = 3 d tokens.
  config.dims = (2, 3, 4, 5, 6)

  # Words of a vocabulary with sinusoidal positions.
  config.vocabulary = 1000
  config.word_dim = 16
  config.num_words = 24
  config.word_tasks = 3
  config.word_starts = 1
  config.word_steps = 30
  # Additive noise; 0 stands for none.
  config.noises = (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)

  # Digits by their labels, eight rows each a token; the spread of starts about
  # the mean image.
  config.labels = (0, 2, 3, 5, 8)
  config.digit_spread = 0.3

  # Sentences of Python's documentation in MiniLM.
  config.num_sentences = 8
  config.sentence_length = 24

  config.accepted = ml_collections.ConfigDict()
  config.accepted.both_from_random = 0.75
  config.accepted.closed_form = 1.0
  config.accepted.weights_recovered = 0.0
  config.accepted.order = (1.6, 2.6)
  config.accepted.nullity_agrees = 1.0

  if tier == "smoke":
    config.sizes = ((8, 8),)
    config.num_tasks, config.side_tasks, config.num_starts = 1, 1, 4
    config.radii = (0.1,)
    config.dims = (2,)
    config.vocabulary, config.word_dim, config.num_words = 50, 4, 8
    config.word_tasks, config.word_starts = 1, 1
    config.noises = (0.0, 1e-2)
    config.labels = (3,)
    config.num_sentences, config.sentence_length = 1, 4
  elif tier == "full":
    config.sizes = (*config.sizes, (128, 64))
    config.num_starts = 256
    config.word_dim, config.num_words = 64, 128
    config.num_sentences = 64
  return config
