"""What all tests share: the gpu mark, and hypothesis without a stopwatch."""

import pytest
from hypothesis import settings

# Examples are timed by the wall clock, which on a busy machine says nothing about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # heavy, and needed only here

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
