"""Configuration of the toy that crashes."""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict({"slug": "crash", "tier": tier})
