"""The manifests of docker/kubernetes: its files, and what kustomize builds of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docker" / "kubernetes"
COMPONENTS = tuple(sorted(path.name for path in (FOLDER / "components").iterdir()))
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")

Manifest = dict[str, Any]


def read(path: Path) -> Any:
    """The content of a file of one document."""
    return yaml.safe_load(path.read_text())


def kustomized(folder: Path, overlay: str, *components: str) -> list[Manifest]:
    """An overlay with components, built from an empty folder, as an overlay of the reader's own would be."""

    def relative(name: str) -> str:
        return os.path.relpath(FOLDER / name, folder)

    content = {
        "resources": [relative(f"overlays/{overlay}")],
        "components": [relative(f"components/{name}") for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    result = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # where deprecated fields are reported
    return list(yaml.safe_load_all(result.stdout))


def builder(folders: pytest.TempPathFactory) -> Callable[..., list[Manifest]]:
    """A function that builds an overlay with components, as an overlay of the reader's own would."""

    @cache
    def build(overlay: str, *components: str) -> list[Manifest]:
        return kustomized(folders.mktemp("overlay").resolve(), overlay, *components)

    return build


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The only one of this kind, or of this kind and name."""
    [found] = [
        manifest
        for manifest in manifests
        if manifest["kind"] == kind and name in (None, manifest["metadata"]["name"])
    ]
    return found


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a selector that asks for something matches these labels."""
    pairs: dict[str, str] = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    among = all(labels.get(each["key"]) in each["values"] for each in expressions)
    return bool(pairs or expressions) and pairs.items() <= labels.items() and among
