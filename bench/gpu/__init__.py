"""All that takes a GPU to check or measure, in one run."""
