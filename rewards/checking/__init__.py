"""The reward-checking stage: a second opinion on rewards, detectors of reward hacking, and a report."""
