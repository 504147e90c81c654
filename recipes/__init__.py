"""Recipes: Hydra YAML only, no logic; `base.yaml` explains every key."""
