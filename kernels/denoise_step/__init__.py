"""next[i] = sample·x + prediction·g + estimate·clamp(x̂) + noise·z, g the guided prediction: one sampler step."""
