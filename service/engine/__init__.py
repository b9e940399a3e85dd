"""Everything between a job and its results: scheduling, steps, and the streams of events. No HTTP."""
