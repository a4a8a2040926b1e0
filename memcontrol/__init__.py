"""MemControl: search which parameters of a diffusion model to fine-tune, so that quality stays and memorization goes."""

__version__ = "0.1.0"
