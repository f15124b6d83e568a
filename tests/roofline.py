"""Print the least time of a training step on GPUs, computed from FLOP and bytes; nothing is measured, and none needed.

PYTHONPATH=. python tests/roofline.py 288 32     # image size in px, labelled images per batch

An operation takes max(FLOP / peak, bytes / bandwidth), its bytes those of its inputs and outputs. "Fused" leaves out
the elementwise operations, as a compiler does that computes them together with their neighbours.
"""

import sys
from collections import defaultdict
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from network import build_network
from utils.distributed import autocast_context
from utils.evaluation.tables import Table, to_markdown
from utils.method.objective import UnlabeledViews, training_step

# Published dense bf16 FLOP/s (float32 sums) and bytes/s of the makers' data sheets.
GPUS = {"H100 SXM": (989e12, 3.35e12), "A100 80 GB": (312e12, 2.04e12), "RTX 4090": (165e12, 1.01e12)}
CLASSES = {"native_batch_norm": "BatchNorm", "_fused_adamw_": "AdamW", "_to_copy": "casts and copies",
           "copy_": "casts and copies", "clone": "casts and copies", "cat": "casts and copies"}  # fmt: skip
FUSED = ("casts and copies", "elementwise and the rest")


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


def count_step(image_size: int, batch: int) -> dict[str, list[tuple[float, float]]]:
    """Return (FLOP, bytes) of the operations of a bf16 step with its optimisers, without the augmentation."""
    with FakeTensorMode():
        nets = [build_network(4).train() for _ in range(2)]
        optimizers = [torch.optim.AdamW(net.parameters(), fused=True) for net in nets]
        image, mask = torch.rand(batch, 1, image_size, image_size), torch.zeros(batch, image_size, image_size).long()
        views = UnlabeledViews((image, image), (image, image), torch.zeros_like(image))
        autocast = partial(autocast_context, torch.device("cpu"), "bf16")
        with OperationCounter() as counter:
            training_step(nets, image, mask, views, dice_classes=slice(None), cps_loss="pixel", cps_weight=3.0,
                          autocast=autocast)  # fmt: skip
            torch.nn.utils.get_total_norm([p.grad for net in nets for p in net.parameters()])
            for optimizer in optimizers:
                optimizer.step()
    return counter.found


def roofline(found: dict[str, list[tuple[float, float]]]) -> Table:
    """Return the table of a step: per class TFLOP, GB and ms on each GPU, then the sums."""

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
    print(to_markdown([roofline(count_step(*map(int, sys.argv[1:])))]))
