"""tokens[i, (y x), (p q c)] = alpha[i]·latents[i] + sigma[i]·noise[i]."""
