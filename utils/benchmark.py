"""How fast this machine trains, on phantoms and with the very engine of a training.

python -m utils.benchmark                                                      # the paper's batch
python -m utils.benchmark --image-size 128 --batch-size 4 --baseline --precision fp32 auto --steps 5
python -m utils.benchmark --roofline                                           # computed for GPUs; none is needed
"""

import json
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode  # there is no public name for it
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from tqdm import tqdm

from config import MMS, Config
from mms_dataloader import DATASET
from network import build_network
from network.resnet import AtrousConv2d
from utils.data.loaders import build_loaders
from utils.data.prepare import prepare_dataset
from utils.device import Process, autocast_context, choose_device
from utils.engine import training_batches
from utils.errors import UserError, clear_errors
from utils.evaluation.predict import predict
from utils.evaluation.tables import Table, to_markdown
from utils.method.objective import UnlabeledViews, training_step
from utils.trainer import Trainer

WARM_UP = 2  # calls before the timed ones
# Published dense bf16 FLOP/s (float32 sums) and bytes/s of the makers' data sheets.
GPUS = {"H100 SXM": (989e12, 3.35e12), "A100 80 GB": (312e12, 2.04e12), "RTX 4090": (165e12, 1.01e12)}
CLASSES = {"native_batch_norm": "BatchNorm", "_fused_adamw_": "AdamW", "_to_copy": "casts and copies",
           "copy_": "casts and copies", "clone": "casts and copies", "cat": "casts and copies"}  # fmt: skip
FUSED = ("casts and copies", "elementwise and the rest")


def benchmark(
    device: str = "auto",
    image_size: int = 288,
    batch_size: int = 32,
    accumulate: int = 1,
    precision: tuple[Literal["auto", "bf16", "fp32"], ...] = ("auto",),
    baseline: bool = False,
    compile: bool = False,
    checkpoint_activations: bool = False,
    workers: int = 4,
    steps: int = 10,
    training: bool = True,
    show_profile: bool = False,
    roofline: bool = False,
    out: Path | None = None,
) -> None:
    """Measure the training step, the input pipeline and inference; medians of synchronised times after a warm-up.

    Args:
        device: as in training.
        image_size: px.
        batch_size: labelled images per batch; twice as many unlabelled ones.
        accumulate: batches per step.
        precision: one column of the table each; "auto" is bf16 where it is faster.
        baseline: a column before the others: float32 with the weights in PyTorch's own layout, not channels_last.
        compile: torch.compile the networks.
        checkpoint_activations: recompute activations in the backward pass.
        workers: of each loader.
        steps: timed ones.
        training: measure training steps, too; without, only the input pipeline and inference.
        show_profile: print the operations that a step spends most time in.
        roofline: print the least time of a step on GPUs, computed from its FLOP and bytes, instead of any measurement.
        out: JSON file to write.
    """
    with clear_errors(), tempfile.TemporaryDirectory() as folder:
        if steps < 1:
            raise UserError(f"--steps {steps}: at least 1 must be timed")
        if roofline:
            cfg = replace(MMS, image_size=image_size, batch_size=batch_size)
            return print(to_markdown([least_times(count_operations(cfg))]))
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"image_size": image_size, "batch_size": batch_size, "accumulate": accumulate, "compile": compile}
        settings |= {"checkpoint_activations": checkpoint_activations, "workers": workers}
        cfg = replace(MMS, data_root=f"{folder}/data", pretrained="none", **settings)
        where = choose_device(device)
        DATASET.write_phantom(Path(folder, "raw"), patients=4, frames=2 + batch_size * accumulate // 64)
        prepare_dataset(Path(folder, "raw"), Path(cfg.data_root), DATASET, workers=2)
        columns = {
            name: measure(
                replace(cfg, precision="fp32" if name == "baseline" else name),
                where,
                steps,
                memory_format=torch.contiguous_format if name == "baseline" else torch.channels_last,
                training=training,
                show_profile=show_profile,
            )
            for name in ("baseline",) * baseline + precision
        }
    machine = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{machine}, torch {torch.__version__}: {image_size} px, steps of {batch_size} x {accumulate} images"
    print("\n" + to_markdown([table(title, columns)]))
    if out:
        found = {"machine": machine, "torch": torch.__version__, **settings, "measured": columns}
        out.write_text(json.dumps(found, indent=2) + "\n")
        print(out)


def measure(
    cfg: Config,
    device: torch.device,
    steps: int,
    *,
    memory_format: torch.memory_format,
    training: bool,
    show_profile: bool,
) -> dict[str, float]:
    """All figures of one configuration; names carry the unit."""
    peak = matmul_peak(device, cfg.precision)
    figures = {"matmul peak, TFLOP/s": peak / 1e12}
    trainer = Trainer(cfg, build_loaders(cfg, DATASET), build_network, Process(device))
    for net in trainer.nets:
        net.to(memory_format=memory_format)
    (read,) = training_batches(trainer.loaders, cfg.accumulate, 0, 1)
    batches = [[{name: value.to(device) for name, value in part.items()} for part in pair] for pair in read]
    if training:
        flop = step_flop(cfg, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = median(lambda: trainer.train_step(batches), device, steps, "step")
        read = training_batches(trainer.loaders, cfg.accumulate, 0, WARM_UP + steps)
        loading = median(lambda: trainer.train_step(next(read)), device, steps, "step with loading")
        figures |= {
            "FLOP of a step, TFLOP": flop / 1e12,
            "step, ms": 1e3 * step,
            "step with data loading, ms": 1e3 * loading,
            "utilisation, % of the peak": 100 * flop / step / peak,
            "training, images/s": cfg.accumulate * cfg.batch_size * (2 + cfg.cutmix) / step,
            "peak memory, GB": peak_memory(device) / 1e9,
        }
    if show_profile:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=activities) as record:
            trainer.train_step(batches)
        order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(record.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50))
    read = training_batches(trainer.loaders, cfg.accumulate, 0, WARM_UP + steps)
    views = median(lambda: [trainer.unlabeled_views(pair[1]) for pair in next(read)], device, steps, "input pipeline")
    image = trainer.unlabeled_views(batches[0][1]).plain[0]
    for net in trainer.nets:
        net.eval()
    inference = median(lambda: predict(trainer.nets, image, autocast=trainer.autocast), device, steps, "inference")
    return figures | {
        "input pipeline, unlabelled images/s": cfg.accumulate * len(batches[0][1]["image"]) / views,
        "inference of both networks, slices/s": len(image) / inference,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU since its counter was reset, or of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def median(call: Callable[[], Any], device: torch.device, repeats: int, name: str) -> float:
    """Median seconds of a call, the device synchronised before and after."""
    seconds, synchronize = [], torch.get_device_module(device).synchronize
    for _ in tqdm(range(WARM_UP + repeats), desc=name, leave=False):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product in that precision; float32 as convolutions have it, with TF32 on GPUs.

    The product is taken as such and as a 1x1 convolution, and the faster one counts: they are by different libraries.
    """
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    size = 8192 if device.type == "cuda" else 2048
    with autocast_context(device, precision):
        reduced = torch.is_autocast_enabled(device.type)
    a, b = torch.rand(2, size, size, device=device).to(torch.bfloat16 if reduced else torch.float32)
    # (size, size) -> image (1, size, 64, size / 64) and weight (size, size, 1, 1), both channels_last.
    image, weight = a.view(1, 64, size // 64, size).permute(0, 3, 1, 2), b.view(size, 1, 1, size).permute(0, 3, 1, 2)
    products = {"matmul": lambda: a @ b, "1x1 convolution": lambda: F.conv2d(image, weight)}
    return 2 * size**3 / min(median(product, device, 20, name) for name, product in products.items())


def step_flop(cfg: Config, device: torch.device) -> int:
    """FLOP of a training step by PyTorch's counter, without what activation checkpointing computes twice."""
    small = replace(cfg, batch_size=2, accumulate=1, compile=False, checkpoint_activations=False, workers=0)
    trainer = Trainer(small, build_loaders(small, DATASET), build_network, Process(device))
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(*training_batches(trainer.loaders, 1, 0, 1))
    return counter.get_total_flops() * cfg.batch_size * cfg.accumulate // small.batch_size


def table(title: str, columns: dict[str, dict[str, float]]) -> Table:
    """Return the metrics, a column per precision, and how many times larger the last column's are than the first's."""
    names = list(columns)
    compared = len(names) > 1
    header = ["", *names] + [f"{names[-1]} / {names[0]}"] * compared
    rows = []
    for metric in columns[names[0]]:
        values = [column[metric] for column in columns.values()]
        rows.append([metric, *(f"{value:.4g}" for value in values)] + [f"{values[-1] / values[0]:.2f}"] * compared)
    return Table(title, "", header, rows)


class OperationCounter(TorchDispatchMode):
    """Count the FLOP and bytes of every operation, by class."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func._overloadpacket.__name__
        if func.is_view or name in ("device", "detach", "empty", "empty_like", "new_empty"):
            return out
        tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        counted = flop_registry.get(func._overloadpacket)
        flop = counted(*args, **(kwargs or {}), out_val=out) if counted else 0
        kind = "convolutions" if counted else CLASSES.get(name.removesuffix("_backward"), FUSED[1])
        self.found[kind].append((flop, sum(x.numel() * x.element_size() for x in tensors.values())))
        return out


def count_operations(cfg: Config) -> dict[str, list[tuple[float, float]]]:
    """Return (FLOP, bytes) by class of the operations of a bf16 step with its optimisers, without the augmentation."""
    batch, size = cfg.batch_size, cfg.image_size
    with FakeTensorMode(), patch.object(AtrousConv2d, "cpu_reach", 1):  # as on a GPU
        nets = [build_network(4).train() for _ in range(2)]
        optimizers = [torch.optim.AdamW(net.parameters(), fused=True) for net in nets]
        image, mask = torch.rand(batch, 1, size, size), torch.zeros(batch, size, size).long()
        views = UnlabeledViews((image, image), (image, image), torch.zeros_like(image))
        autocast = partial(autocast_context, torch.device("cpu"), "bf16")
        with OperationCounter() as counter:
            training_step(nets, image, mask, views, dice_classes=slice(None), cps_loss=cfg.cps_loss,
                          cps_weight=cfg.cps_weight, autocast=autocast)  # fmt: skip
            torch.nn.utils.get_total_norm([p.grad for net in nets for p in net.parameters()])
            for optimizer in optimizers:
                optimizer.step()
    return counter.found


def least_times(found: dict[str, list[tuple[float, float]]]) -> Table:
    """Return the table of the least time of a step: per class TFLOP, GB and ms on each GPU, then the sums.

    An operation takes max(FLOP / peak, bytes / bandwidth), its bytes those of its inputs and outputs. "Fused" leaves
    out the elementwise operations, as a compiler does that computes them together with their neighbours.
    """

    def ms(kind: str, flops: float, bandwidth: float) -> float:
        return 1e3 * sum(max(f / flops, b / bandwidth) for f, b in found[kind])

    kinds = sorted(found, key=lambda kind: -sum(b for _, b in found[kind]))
    rows = []
    for kind in kinds:
        flop, size = (sum(values) for values in zip(*found[kind], strict=True))
        rows.append(
            [kind, f"{flop / 1e12:.1f}", f"{size / 1e9:.0f}", *(f"{ms(kind, *gpu):.1f}" for gpu in GPUS.values())]
        )
    eager = [sum(ms(kind, *gpu) for kind in kinds) for gpu in GPUS.values()]
    fused = [sum(ms(kind, *gpu) for kind in kinds if kind not in FUSED) for gpu in GPUS.values()]
    bound = [
        1e3 * sum(b / gpu[1] for values in found.values() for f, b in values if b / gpu[1] > f / gpu[0])
        for gpu in GPUS.values()
    ]
    rows.append(["step, eager", "", "", *(f"{value:.0f}" for value in eager)])
    rows.append(["of it bound by memory", "", "", *(f"{100 * b / e:.0f} %" for b, e in zip(bound, eager, strict=True))])
    rows.append(["step, fused", "", "", *(f"{value:.0f}" for value in fused)])
    return Table("Least ms of a step, computed", "", ["", "TFLOP", "GB", *GPUS], rows)


if __name__ == "__main__":
    tyro.cli(benchmark)
