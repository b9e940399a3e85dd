"""Other servers of the same network, each as a user would write it from that project's documentation.

Every peer runs twice: over diffusers, and with our own runtime inside (`pipeline.py`). All of them answer a
POST with JSON that holds every image of the request as a base64 PNG.
"""
