"""The real service under disturbances: what is accepted ends exactly once, with the bytes of a quiet run."""
