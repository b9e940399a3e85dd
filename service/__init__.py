"""The DDPM service: a diffusion network behind HTTP, every request in one batch."""

__version__ = "0.2.0"
