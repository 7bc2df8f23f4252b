"""The forward and backward of a training step where it can be had for less than from the libraries: torch alone."""
