"""Dikin walks: barriers, sketches, the soft threshold, bodies of biology.

  python -m experiments.dikin_walk \
    --config=configs/dikin_walk.py:cpu --workdir=/tmp/dikin

cpu, 2 cores that nothing else uses: about six minutes. Expect "reproduced":
with one pair of facets repeated steps grow like the power 0.9 of the number of
copies for the logarithmic barrier, 0.3 for that of Lee and Sidford with four
iterations for its weights, and by a half in all for 512 copies with sixteen;
with all of them repeated like 0.9, 0.43 and 0.04; a step size of the order 1 /
sqrt(d) is too long in spectrahedra; sketched walks keep their law; long boxes
cost nothing; the core metabolism of E. coli mixes unrounded, as hit and run
does not. smoke: seconds, decides nothing. full, one accelerator, not run yet:
also a polytope of 500 dimensions and the network iJO1366.
"""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  """Returns the configuration of one tier."""
  config = ml_collections.ConfigDict()
  config.slug = "dikin-walk"
  config.tier = tier
  config.seed = 0
  # Draws a second are reported: nothing else may run beside this experiment.
  config.timed = True

  # Chains of all but spectrahedra and networks, and every how many steps a draw
  # is kept.
  config.chains, config.thin = 128, 10

  # Copies of one pair of facets of a cube, with the best of these step sizes;
  # steps of a chain by barrier, for each number of copies.
  config.kinds = ("log", "vaidya", "lee_sidford", "lee_sidford_16")
  config.dim = 6
  config.repeats = (1, 8, 64, 512)
  config.slope_over = (8, 64)
  config.step_sizes = (0.9, 1.6, 2.4, 3.6)
  config.facet_steps = ml_collections.ConfigDict()
  config.facet_steps.log = (8000, 16_000, 30_000, 40_000)
  config.facet_steps.vaidya = (8000, 8000, 16_000, 10_000)
  config.facet_steps.lee_sidford = (8000, 24_000, 24_000, 3000)
  config.facet_steps.lee_sidford_16 = (4000, 8000, 8000, 2000)
  # Copies of all facets, with one step size, so small that nearly all steps are
  # accepted.
  config.kinds_all = ("log", "vaidya", "lee_sidford")
  config.all_step_size = 0.5
  config.repeats_all = (4, 16, 64)
  config.all_steps = ml_collections.ConfigDict()
  config.all_steps.log = (10_000, 24_000, 50_000)
  config.all_steps.vaidya = (10_000, 16_000, 24_000)
  config.all_steps.lee_sidford = (8000, 8000, 6000)
  # In the picture of a hexagon.
  config.shown_repeats = 64

  # Positive n x n matrices of bounded trace: chains for each of two step sizes.
  config.cone_sizes = (2, 3, 4, 6, 8, 10)
  config.cone_chains, config.cone_steps = 256, 40

  # Constraints, or rows of a matrix, and dimensions; rows of sketches.
  config.sketched = ("polytope", "spectrahedron")
  config.sketch_sizes = ml_collections.ConfigDict()
  config.sketch_sizes.polytope = (1000, 10)
  config.sketch_sizes.spectrahedron = (16, 3)
  config.sketch_rows = ml_collections.ConfigDict()
  config.sketch_rows.polytope = (40, 160, 640)
  config.sketch_rows.spectrahedron = (16, 64, 256)
  # Steps, and how many times as many before them.
  config.sketch_steps, config.sketch_burn_in = 60, 30

  # A normal density in a cube, its standard deviation; chains by step size.
  config.soft_dim, config.sigma = 10, 0.1
  config.soft_step_sizes = (0.1, 0.2, 0.4, 1.0, 2.0)
  config.soft_chains, config.soft_steps = 16, 50_000

  # Rotated boxes, by the longest edge over the shortest.
  config.aspects = (1.0, 10.0, 100.0)
  config.aspect_dim, config.aspect_steps = 10, 30_000

  # A model that ships with cobra, and doubly stochastic matrices; R-hat by the
  # share of steps taken.
  config.bodies = ("textbook", "birkhoff3", "birkhoff5")
  config.shown_bodies = ("textbook",)
  config.walks = (
    "Dikin",
    "hit and run",
    "coordinate hit and run",
    "rounded hit and run",
  )
  config.body_chains, config.body_steps = 32, 40_000
  config.body_thin, config.body_warmup = 40, 1000
  config.single_steps = 4000
  config.body_shares = (0.0625, 0.125, 0.25, 0.5, 1.0)

  config.accepted = ml_collections.ConfigDict()
  # At least, for the logarithmic barrier; at most, for that of Lee and Sidford.
  config.accepted.log_slope, config.accepted.lee_sidford_slope = 0.6, 0.35
  # What the scaling of the Hessian says: 1, 1/2, 0.
  config.accepted.all_slope = ml_collections.ConfigDict()
  config.accepted.all_slope.log = (0.85, 1.15)
  config.accepted.all_slope.vaidya = (0.4, 0.6)
  config.accepted.all_slope.lee_sidford = (-0.1, 0.1)
  config.accepted.by_d, config.accepted.by_nd = 0.35, 0.5
  config.accepted.standard_errors = 4.0
  config.accepted.common_gain, config.accepted.sketch_loss = 0.0, 0.1
  config.accepted.soft_gain, config.accepted.smoothness_gain = 2.0, 30.0
  config.accepted.aspect = (0.7, 1.3)
  config.accepted.mixed, config.accepted.not_mixed = 1.1, 1.5

  if tier == "smoke":
    config.chains, config.thin = 16, 5
    config.kinds = config.kinds_all = ("log",)
    config.repeats, config.slope_over = (1, 4), (1, 4)
    config.step_sizes = (1.6, 2.4)
    config.repeats_all = (1, 4)
    for steps in (config.facet_steps, config.all_steps):
      steps.update(dict.fromkeys(steps, (100, 100)))
    config.cone_sizes = (2,)
    config.cone_chains, config.cone_steps = 32, 10
    config.sketched = ("polytope",)
    config.sketch_sizes.polytope = (40, 3)
    config.sketch_rows.polytope = (8,)
    config.sketch_steps, config.sketch_burn_in = 10, 2
    config.soft_step_sizes = (0.2, 1.0)
    config.soft_chains, config.soft_steps = 8, 100
    config.aspects, config.aspect_steps = (10.0,), 100
    config.bodies = config.shown_bodies = ("birkhoff3",)
    config.walks = ("Dikin",)
    config.body_chains, config.body_steps = 8, 200
    config.body_thin, config.body_warmup = 10, 20
    config.single_steps, config.body_shares = 20, (1.0,)
  elif tier == "full":
    config.chains = 1024
    config.repeats_all = (4, 16, 64, 256)
    config.all_steps.log = (4000, 10_000, 30_000, 100_000)
    config.all_steps.vaidya = (4000, 6000, 10_000, 20_000)
    config.all_steps.lee_sidford = (3000, 3000, 2000, 2000)
    config.cone_sizes = (2, 4, 8, 16, 32)
    config.cone_chains = 2048
    config.sketch_sizes.polytope = (5000, 500)
    config.sketch_rows.polytope = (2000, 8000, 32_000)
    config.sketch_sizes.spectrahedron = (64, 10)
    config.sketch_rows.spectrahedron = (64, 256, 1024)
    config.bodies = ("textbook", "iJO1366", "birkhoff10", "birkhoff20")
    config.shown_bodies = ("textbook", "iJO1366")
    config.body_chains, config.body_steps = 1024, 200_000
    config.body_thin = 200
  return config
