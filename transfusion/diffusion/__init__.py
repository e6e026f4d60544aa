"""How images are noised in training and denoised in sampling."""
