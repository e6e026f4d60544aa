"""Which tiles of the score matrix an interval mask leaves to compute: runs of masked and of full tiles."""
