"""Rollout engines. Each answers `generate`, `load_weights`, and (on a GPU) `sleep` and `wake`."""
