"""loss[i] = mean((prediction[i] - target[i])²), target = data_weight[i]·latents[i] + noise_weight[i]·noise[i]."""
