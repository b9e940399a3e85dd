"""The judge of generated images: a small convolutional classifier, trained here on the real ones.

Its prediction says whether a sample shows the requested class, and its penultimate layer is the space in
which sets of images are compared (model/evaluation/fidelity.py). The trained network is kept in a safetensors
file together with its settings, and is trained again when those differ.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from model.files import replacing
from model.training.data import Dataset, ImageSource, Labels, Pixels

GRID = 4
"""Positions per side that the last feature map is pooled to, whatever the size of the image."""


@dataclass(frozen=True)
class ClassifierConfig:
    """How to train. `shift` is the augmentation: pixels by which an image may move in each direction."""

    epochs: int = 6
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    shift: int = 1
    width: int = 32
    features: int = 64
    seed: int = 0


class Classifier(nn.Module):
    """Three convolutions, each followed by a halving, and two linear layers with the features in between."""

    def __init__(self, channels: int, classes: int, config: ClassifierConfig) -> None:
        super().__init__()
        w = config.width
        self.body = nn.Sequential(
            nn.Conv2d(channels, w, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(w),
            nn.ReLU(),
            nn.Conv2d(w, 2 * w, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(2 * w),
            nn.ReLU(),
            nn.Conv2d(2 * w, 4 * w, 3, padding=1, bias=False),
            nn.AdaptiveMaxPool2d(GRID),
            nn.BatchNorm2d(4 * w),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * w * GRID**2, config.features),
            nn.ReLU(),
        )
        self.head = nn.Linear(config.features, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, C, H, W] in [-1, 1], H and W at least 4. Returns features [B, D] and logits [B, classes]."""
        features = self.body(x)
        return features, self.head(features)


class Judgement(NamedTuple):
    """The judge's output for N images: features [N, D] float64 and predicted classes [N] int64."""

    features: NDArray[np.float64]
    labels: Labels


def train(dataset: Dataset, config: ClassifierConfig) -> Classifier:
    """Train on `dataset`: AdamW, the rate rising over a tenth of the steps and then falling linearly to zero.

    Every random draw comes from `config.seed`. Returns the network in eval mode.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        net = Classifier(dataset.images.shape[1], len(dataset.class_names), config)
    net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    rng = torch.Generator().manual_seed(config.seed)
    per_epoch = max(1, len(dataset) // config.batch_size)
    total = config.epochs * per_epoch
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=config.weight_decay, fused=True)
    with tqdm(total=total, desc="classifier", unit="step", mininterval=1) as bar:
        for step in range(total):
            if step % per_epoch == 0:
                order = torch.randperm(len(dataset), generator=rng).numpy()
            at = step % per_epoch * config.batch_size
            index = order[at : at + config.batch_size]
            x = shifted(torch.from_numpy(dataset.batch(index)), config.shift, rng).to(device)
            y = torch.from_numpy(dataset.labels[index]).to(device)
            progress = (step + 1) / total
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(progress / 0.1, (1 - progress) / 0.9 + 1 / total)
            with torch.autocast(device.type, torch.bfloat16):
                _, logits = net(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    return net.eval()


def shifted(x: Tensor, by: int, rng: torch.Generator) -> Tensor:
    """Move each image by up to `by` pixels down or up and right or left; edges are repeated.

    x: [B, C, H, W]; rng: on the CPU. Returns the same shape.
    """
    b, c, height, width = x.shape
    dy, dx = torch.randint(-by, by + 1, (2, b, 1), generator=rng)
    rows = (torch.arange(height) + dy).clamp(0, height - 1)
    columns = (torch.arange(width) + dx).clamp(0, width - 1)
    batch, channel = torch.arange(b).view(-1, 1, 1, 1), torch.arange(c).view(1, -1, 1, 1)
    return x[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


@torch.no_grad()
def judge(net: Classifier, images: ImageSource | Pixels, index: NDArray[np.int64] | None = None) -> Judgement:
    """Features and predicted classes of the images [N, C, H, W] uint8, or of those at `index`, in float32."""
    chosen = np.arange(images.shape[0]) if index is None else index
    device = net.head.weight.device
    features: list[NDArray[np.float32]] = []
    labels: list[Labels] = []
    for start in range(0, len(chosen), 500):
        pixels = torch.from_numpy(images[chosen[start : start + 500]]).to(device)
        f, logits = net(pixels.float() / 127.5 - 1)
        features.append(f.cpu().numpy())
        labels.append(logits.argmax(1).cpu().numpy())
    return Judgement(np.concatenate(features).astype(np.float64), np.concatenate(labels))


def load_or_train(path: Path, dataset: Dataset, config: ClassifierConfig) -> Classifier:
    """The classifier kept at `path` if it came from these settings and labels, else a new one, kept there."""
    origin = json.dumps(
        {
            **asdict(config),
            "shape": [int(n) for n in dataset.images.shape],
            "classes": dataset.class_names,
            "labels": sha256(dataset.labels.tobytes()).hexdigest(),
        }
    )
    net = Classifier(dataset.images.shape[1], len(dataset.class_names), config)
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("origin") == origin:
                net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                return net.eval()
    except (OSError, SafetensorError):
        pass  # missing or unreadable: trained and written below
    net = train(dataset, config).cpu()
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(save(state, {"origin": origin}))
    return net
