"""What test_distributed.py starts with torchrun: a short run of a small network, and a record of what it did."""

import hashlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from helpers import MMS, TinyNetwork

from config import MMS_DEMO, ROBUST
from utils.data.loaders import build_loaders
from utils.device import average, process_group
from utils.engine import fit
from utils.errors import clear_errors
from utils.method.losses import cross_pseudo_loss, kl_variance
from utils.trainer import Trainer


def joined_gradients(process):
    """Largest relative difference of the averaged gradients of a mean-type loss to those of the joined batch."""
    torch.manual_seed(0)
    net, image, label = TinyNetwork(4).double().eval(), torch.rand(4, 1, 16, 16).double(), torch.zeros(4, 16, 16).long()
    differences = []
    for part in (slice(2 * process.rank, 2 * process.rank + 2), slice(None)):
        net.zero_grad()
        logits = net(image[part])
        variance = kl_variance(logits, net(image[part].sqrt()))
        cross_pseudo_loss(logits, label[part], variance, "pixel").backward()
        gradients = [p.grad.clone() for p in net.parameters()]
        if part != slice(None):
            average(gradients)
        differences.append(gradients)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*differences, strict=True))


def main():
    settings = json.loads(sys.argv[1])
    die_at, stop_at = settings.pop("die_at", None), settings.pop("stop_at", None)
    cfg = replace(MMS_DEMO, **ROBUST | {"demo": False, "device": "cpu"} | settings)
    seen, trainers = [], []
    original = Trainer.train_step

    def recording(self, batches, **options):
        # No unlabelled images are read during the warm-up.
        seen.extend([[] if batch is None else batch["row"].tolist() for batch in pair] for pair in batches)
        trainers[:] = [self]
        original(self, batches, **options)
        if self.process.rank == 1 and self.step == die_at:
            os._exit(3)
        if self.process.rank == 0 and self.step == stop_at:
            print("first step done", flush=True)
            time.sleep(3)  # for the signal to arrive before the last step

    Trainer.train_step = recording
    with clear_errors(), process_group("cpu") as process:
        loaders = build_loaders(cfg, MMS, rank=process.rank, world_size=process.world_size)
        difference = joined_gradients(process)
        fit(cfg, loaders, TinyNetwork, process)
        state = [value.numpy().tobytes() for net in trainers[0].nets for value in net.state_dict().values()]
        record = {
            "seen": seen,
            "weights": hashlib.sha256(b"".join(state)).hexdigest(),
            "gradients": difference,
            "steps": loaders.steps_per_epoch,
        }
        Path(cfg.out_root, f"rank{process.rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
