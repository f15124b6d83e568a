"""What several tests share: where the project lies, and a small stand-in for the network."""

import multiprocessing
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"


class TinyNetwork(nn.Module):
    """Has what the training must handle: BatchNorm, dropout, two scales."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Conv2d(8, num_classes, 1)

    def forward(self, image):
        return self.classifier(self.features(image))


def build_tiny_network(num_classes, pretrained="none"):
    return TinyNetwork(num_classes)


def start_process(target, *args):
    """Start `target` in a process of its own; never by a fork of this one, whose threads may hold locks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["utils.engine", "utils.data.loaders", "helpers"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def seeded_weights(shapes, seed):
    """Return the weights behind the parity fixtures: the i-th key in sorted order is drawn from rng [seed, i]."""
    state = {}
    for i, (key, shape) in enumerate(sorted(shapes.items())):
        r = np.random.default_rng([seed, i])
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape, np.int64)
        elif key.endswith("running_var"):
            value = r.uniform(0.5, 1.5, shape)
        elif key.endswith("running_mean") or key.endswith("bias"):
            value = r.normal(0, 0.1, shape)
        elif len(shape) == 4:
            value = r.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        else:
            value = r.uniform(0.5, 1.0, shape)
        state[key] = torch.from_numpy(np.asarray(value)).to(torch.int64 if value.dtype == np.int64 else torch.float32)
    return state
