"""Servers that are always stopped, and a tiny model on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from model import checkpoint
from tests.service.fakes import tiny_model
from tests.service.live import Process, Serve, serving


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The networks here are tiny: threads only get into each other's way."""
    torch.set_num_threads(1)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts the app with a fake denoiser on a real socket."""
    yield from serving()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    checkpoint.save(folder, tiny_model())
    return folder


@pytest.fixture
def launch() -> Iterator[Callable[..., Process]]:
    """Starts `python -m service`, or another command, with flags and environment."""
    running: list[Process] = []

    def start(*flags: str, command: Sequence[str] = ("-m", "service"), **env: str) -> Process:
        running.append(Process(list(flags), env, command))
        return running[-1]

    yield start
    for process in running:
        process.stop()
