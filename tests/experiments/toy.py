"""The smallest configuration."""

import ml_collections


def config(**fields) -> ml_collections.ConfigDict:
  """Returns a configuration with a slug and a tier."""
  return ml_collections.ConfigDict({"slug": "toy", "tier": "cpu", **fields})
