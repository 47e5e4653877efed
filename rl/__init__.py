"""The reinforcement-learning engine: config, data, algorithms, learner, rollout engines, the Ray loop, evaluation."""
