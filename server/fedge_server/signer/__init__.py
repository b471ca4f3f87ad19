"""A process of its own user that holds a tier's key, and signs what it has judged itself and nothing else."""
