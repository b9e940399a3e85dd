"""From a validated request to a job: what can be asked for, with every default filled in. No HTTP, no torch."""
