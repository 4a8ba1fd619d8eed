"""Training: the TRL seam, the run directory, and the run itself."""
