"""What the figures were measured on: processor, memory, and the versions of all that took part."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("torch", "openvino", "diffusers", "fastapi", "uvicorn", "litserve", "mosec", "ray", "bentoml")


def describe() -> dict[str, object]:
    """Facts by name. `cores`: those that this process may use."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": processor(),
        "cores": len(psutil.Process().cpu_affinity() or ()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def processor(facts: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, and which instructions for neural networks it has."""
    lines = [line.partition(":") for line in facts.read_text().splitlines()] if facts.exists() else []
    found = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = found.get("flags", "").split()
    extensions = [
        flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags
    ]
    name = found.get("model name") or platform.processor() or "unknown"
    return f"{name} ({', '.join(extensions)})" if extensions else name
