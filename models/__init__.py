"""Policies: one decoder with NSA or full attention, its caches, loading of public checkpoints, the embedded policy."""
