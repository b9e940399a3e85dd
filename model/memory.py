"""Whether a network fits into memory, found from its files' headers before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

ROOT = Path("/")
BYTES = 4
"""Of a weight: networks are built in float32, whatever runs them afterwards."""


def needed(files: Iterable[Path]) -> int:
    """Bytes that the tensors of safetensors files take at least; a file that cannot be read has none."""
    total = 0
    for file in filter(Path.is_file, files):  # a pipe would be waited for
        with suppress(SafetensorError, OSError), safe_open(file, framework="numpy") as tensors:
            names = tensors.keys()  # it cannot be iterated over by itself
            total += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
    return total * BYTES


def available(root: Path = ROOT) -> int | None:
    """Bytes that this process may still have, of the machine's and of its control groups'; None: not known.

    root: where `proc` and `sys` are. Swap counts, and so do files in memory that can be dropped.
    """
    return min([*_of_machine(root), *_of_groups(root)], default=None)


def _of_machine(root: Path) -> Iterator[int]:
    with suppress(OSError, ValueError, KeyError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        sizes = {
            name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)
        }
        yield sizes["MemAvailable"] + sizes.get("SwapFree", 0)


def _of_groups(root: Path) -> Iterator[int]:
    """What is left in each group that this process is in, of cgroup v2 or v1."""
    mounted = root / "sys/fs/cgroup"
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            place = mounted / controllers
            names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
            inside = place / path.lstrip("/")
            # A container may see its own group as the root, whatever the path says.
            for group in {place, inside, *(each for each in inside.parents if place in each.parents)}:
                with suppress(OSError, ValueError, KeyError):  # "max" is no number
                    limit, used = (int((group / f"memory.{name}").read_text()) for name in names)
                    yield limit - used + _droppable(group / "memory.stat")


def _droppable(stat: Path) -> int:
    """Bytes of files in memory that were not used lately."""
    sizes = dict(line.split() for line in stat.read_text().splitlines())
    return int(sizes.get("total_inactive_file", sizes.get("inactive_file", 0)))
