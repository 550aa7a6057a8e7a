"""A real SLURM of two nodes on this machine, and the templates run on it."""
