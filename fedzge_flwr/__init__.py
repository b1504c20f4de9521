"""FedZGE for Flower: one central model from clients that answer logit queries and nothing else."""

__version__ = "0.1.0"
