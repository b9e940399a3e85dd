"""Diffusion models: networks, noise schedules, samplers, training. Knows nothing of the service."""
