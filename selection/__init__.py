"""Sample selection: the reward history, LIM and the methods one would compare it with, and the selection report."""
