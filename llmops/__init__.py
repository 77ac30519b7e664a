"""Launch LLM runs on SLURM, Kubernetes or this machine, and keep them going until they are done."""

__version__ = "0.1.0"
