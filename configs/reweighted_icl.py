"""Reweighted in-context learning against its baselines, on spoiled prompts.

  python -m experiments.reweighted_icl \
    --config=configs/reweighted_icl.py:cpu --workdir=/tmp/reweighted_icl

cpu, 2 cores: about four minutes, half of it to train the in-context model.
Expect "reproduced": with 6 or 3 clean examples, and 6 of 16 labels random or of
another task, learned weights at least halve the error of the plain prompt, to
0.03 from 0.4 for 6, and do no worse than fine-tuning and than showing the clean
examples alone; a clean prompt they do not spoil. Expect also what speaks
against them and decides nothing: four learned examples that are appended are
better as a rule, and with 16 clean examples showing these alone is better than
all.
smoke: seconds, decides nothing. full, one accelerator, hours, not run yet: 20
dimensions, 64 examples, 12 layers of width 256.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "reweighted-icl"
  config.tier = tier
  config.seed = 0

  # The in-context model and the tasks that it is trained on.
  config.dim = 3
  config.num_examples = 16
  config.width = 32
  config.num_layers = 2
  config.num_heads = 2
  config.train_steps = 4000
  # At which its error is reported.
  config.reported_steps = (1000, 2000, 4000)

  # How prompts are spoiled: kind, how many of the examples, scale.
  config.corruptions = (
    ("clean", 0, 1.0),
    ("bias_some", 8, 2.0),
    ("noise_some", 6, 1.0),
    ("other_task", 6, 1.0),
    ("imbalanced", 14, 1.0),
  )
  # Clean examples; the same tasks for all kinds and sizes.
  config.nums_val = (3, 6, 16)
  config.num_tasks = 32
  config.num_queries = 32
  config.ridge = 0.1
  config.num_steps = 150

  # The claim is decided for these, the others are reported.
  config.decided_kinds = ("noise_some", "other_task")
  config.decided_nums_val = (3, 6)

  # How much the regularizer matters.
  config.ridges = (0.01, 0.1, 1.0)
  config.ridge_kind = "noise_some"
  config.ridge_num_val = 6

  # Real prompts, of the diabetes table, their labels spoiled.
  config.diabetes_kind = "noise_some"
  config.diabetes_num_val = 6

  config.accepted = ml_collections.ConfigDict()
  config.accepted.over_icl = (0.0, 0.5)
  config.accepted.over_other = (0.0, 1.0)
  config.accepted.clean = (0.0, 1.2)
  # Wrong examples picked out of a prompt by their weight: area under the ROC.
  config.auc_kinds = ("bias_some", "noise_some", "other_task")
  config.auc_nums_val = (6, 16)

  if tier == "smoke":
    config.width, config.num_layers = 8, 1
    config.num_examples = 8
    config.train_steps = 4
    config.reported_steps = (4,)
    config.corruptions = (
      ("clean", 0, 1.0),
      ("bias_some", 4, 2.0),
      ("noise_some", 3, 1.0),
      ("other_task", 3, 1.0),
    )
    config.nums_val = config.decided_nums_val = config.auc_nums_val = (4,)
    config.num_tasks = 3
    config.num_queries = 4
    config.num_steps = 4
    config.ridges = (0.1,)
    config.ridge_num_val = config.diabetes_num_val = 4
  elif tier == "full":
    config.dim = 20
    config.num_examples = 64
    config.width = 256
    config.num_layers = 12
    config.num_heads = 8
    config.train_steps = 100_000
    config.reported_steps = (25_000, 50_000, 100_000)
    config.corruptions = (
      ("clean", 0, 1.0),
      ("bias_some", 32, 2.0),
      ("noise_some", 24, 1.0),
      ("other_task", 24, 1.0),
      ("imbalanced", 44, 1.0),
    )
    config.nums_val = (8, 24, 64)
    config.decided_nums_val = (8, 24)
    config.auc_nums_val = (24, 64)
    config.ridge_num_val = config.diabetes_num_val = 24
    config.num_tasks = 128
  return config
