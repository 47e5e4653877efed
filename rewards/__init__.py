"""Rule-checked rewards: answer extraction, equivalence, the verifier, reward shaping, the reward-checking stage."""
