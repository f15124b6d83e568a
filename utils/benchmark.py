"""How fast this machine trains, on phantoms and with the engine of a training (docs/benchmark.md)."""

import resource
import statistics
import tempfile
import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from config import MMS, Config
from mms_dataloader import DATASET
from network import build_network
from utils.data.loaders import build_loaders
from utils.data.prepare import prepare_dataset
from utils.device import Process, choose_device
from utils.errors import UserError, clear_errors
from utils.evaluation.predict import predict
from utils.evaluation.tables import Table, to_markdown
from utils.trainer import Trainer

WARM_UP = 2  # calls before the timed ones


def benchmark(
    device: str = "auto", image_size: int = 288, batch_size: int = 32, accumulate: int = 1,
    precision: tuple[Literal["auto", "bf16", "fp32"], ...] = ("auto",), baseline: bool = False, compile: bool = False,
    checkpoint_activations: bool = False, workers: int = 4, steps: int = 10,
) -> None:  # fmt: skip
    """Measure the training step and inference: medians of synchronised times after a warm-up.

    Args:
        device: "auto", "cuda" or "cpu", as in training.
        image_size: side of the images, px.
        batch_size: labelled images per batch; twice as many unlabelled ones.
        accumulate: batches per step.
        precision: a column each; "auto" is bf16 where it is faster.
        baseline: one more column: float32, and the weights in PyTorch's layout, not channels_last.
        compile: compile the networks.
        checkpoint_activations: recompute activations in the backward pass.
        workers: processes of each loader.
        steps: timed calls behind each median.
    """
    if steps < 1:
        raise UserError(f"--steps {steps}: at least 1 must be timed")
    settings = {"image_size": image_size, "batch_size": batch_size, "accumulate": accumulate, "compile": compile}
    settings |= {"checkpoint_activations": checkpoint_activations, "workers": workers}
    process = Process(choose_device(device))
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(MMS, data_root=f"{folder}/data", pretrained="none", **settings)
        DATASET.write_phantom(Path(folder, "raw"), patients=4, frames=2 + batch_size * accumulate // 64)
        prepare_dataset(Path(folder, "raw"), Path(cfg.data_root), DATASET, workers=2)
        columns = {name: measure(name, cfg, process, steps) for name in ("baseline",) * baseline + precision}
    on_gpu = process.device.type == "cuda"
    machine = torch.cuda.get_device_name(process.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    title = f"{machine}, torch {torch.__version__}: {image_size} px, steps of {batch_size} x {accumulate} images"
    rows = [[name, *(f"{column[name]:.4g}" for column in columns.values())] for name in columns[precision[0]]]
    print("\n" + to_markdown([Table(title, ["", *columns], rows)]))


def measure(column: str, cfg: Config, process: Process, steps: int) -> dict[str, float]:
    """Return the figures of a column ("baseline" or a precision)."""
    cfg = replace(cfg, precision="fp32" if column == "baseline" else column)
    device, trainer = process.device, Trainer(cfg, build_loaders(cfg, DATASET), build_network, process)
    if column == "baseline":
        for net in trainer.nets:
            net.to(memory_format=torch.contiguous_format)
    (batches,) = trainer.loaders.training_batches(cfg.accumulate, 0, 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = median(lambda: trainer.train_step(batches), device, steps, "step")
    read = trainer.loaders.training_batches(cfg.accumulate, 0, WARM_UP + steps)
    loading = median(lambda: trainer.train_step(next(read)), device, steps, "step with loading")
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident
    image = trainer.unlabeled_views(batches[0][1]).plain[0]
    with trainer.evaluating() as predictor:
        both = partial(predict, predictor.nets, image, autocast=predictor.autocast)
        inference = median(both, device, steps, "inference")
    return {
        "step, ms": 1e3 * step,
        "step with data loading, ms": 1e3 * loading,
        "training, images/s": cfg.accumulate * cfg.batch_size * (2 + cfg.cutmix) / step,
        "peak memory, GB": peak / 1e9,
        "inference of both networks, slices/s": len(image) / inference,
    }


def median(call: Callable, device: torch.device, repeats: int, name: str) -> float:
    """Return the median seconds of a call, the device synchronised before and after."""
    synchronize = torch.get_device_module(device).synchronize
    timer = timeit.Timer(lambda: (call(), synchronize()), synchronize)
    calls = tqdm(range(WARM_UP + repeats), desc=name, leave=False)
    return statistics.median([timer.timeit(1) for _ in calls][WARM_UP:])


if __name__ == "__main__":
    with clear_errors():
        tyro.cli(benchmark)
