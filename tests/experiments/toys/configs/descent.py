"""Configuration of the toy training."""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      "slug": "descent",
      "tier": tier,
      "seed": 0,
      "num_steps": 200,
      "pause": 0.0,
      "accepted": 0.1,
    }
  )
