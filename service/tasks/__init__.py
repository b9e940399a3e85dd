"""From a validated request to a job, with every default filled in. No HTTP, no torch."""
