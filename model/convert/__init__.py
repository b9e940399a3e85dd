"""Other projects' checkpoints → model folders in diffusers' layout. `python -m model.convert SOURCE OUT`.

One module per family: what its weights are called, and what its code says that its weights do not. Each has
a function from a state dict to a `Conversion`, which touches no file. A program for the terminal: the service
imports nothing of it.
"""
