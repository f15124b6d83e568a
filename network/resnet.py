"""The dilated ResNet-50 backbone, made of timm's blocks, and its pretrained weights."""

import itertools
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError, first_line

TIMM_NAME = "resnet50s.gluon_in1k"  # ResNet-50 with the deep stem 64, 64, 128


class AtrousConv2d(nn.Conv2d):
    """A 3x3 convolution with dilation = padding = `rate`, without bias, that keeps the map's size.

    With a large rate the outer taps read mostly padding. There each tap is a matrix product on the part of the map that
    it reads: less work, and without the copies of all weights that the backward pass of a dilated convolution makes on
    CPUs (docs/benchmark.md). On GPUs, where this is not measured, only where the outer taps read nothing but padding.
    """

    cpu_reach = 2  # maps up to so many times the rate are computed tap by tap on CPUs

    def __init__(self, in_channels: int, out_channels: int, rate: int):
        super().__init__(in_channels, out_channels, 3, padding=rate, dilation=rate, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (height, width), rate = x.shape[-2:], self.dilation[0]
        if max(height, width) > rate * (self.cpu_reach if x.device.type == "cpu" else 1):
            return super().forward(x)
        image = x.movedim(1, -1)  # (B, H, W, C)
        total = x.new_zeros(1, dtype=torch.float32)  # in bf16 each of nine sums would be rounded
        moves = itertools.product((-rate, 0, rate), repeat=2)
        for (row, column), weight in zip(moves, self.weight.permute(2, 3, 0, 1).flatten(0, 1), strict=True):
            if abs(row) < height and abs(column) < width:
                sides = (0, 0, -column, column, -row, row)
                read = _pad(image, [min(0, side) for side in sides])
                part = F.linear(read.flatten(0, 2), weight).view(*read.shape[:-1], -1)
                total = total + _pad(part, [max(0, side) for side in sides])
        return total.to(x.dtype).movedim(-1, 1)


def _pad(image: torch.Tensor, sides: list[int]) -> torch.Tensor:
    return F.pad(image, sides) if any(sides) else image  # F.pad would copy it


class ResNet(nn.Module):
    """ResNet-50 with a deep stem, output strides 4 (stage 1) and 16 (stage 4).

    forward: (B, C, H, W) -> (stage 1: (B, 256, H/4, W/4), stage 4: (B, 2048, H/16, W/16)).
    State-dict keys equal those of timm's `resnet50s` without `fc`. Dilated as in Chen et al. 2018, DeepLabv3+.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        net = timm.create_model("resnet50s", in_chans=in_channels, num_classes=0, output_stride=16)
        for block, rate in zip(net.layer4, (2, 4, 8), strict=True):  # one dilation rate per block of stage 4
            plain = block.conv2
            block.conv2 = AtrousConv2d(plain.in_channels, plain.out_channels, rate)
            block.conv2.load_state_dict(plain.state_dict())  # timm's initialisation
        for name in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(net, name))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stage1 = self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(x)))))
        return stage1, self.layer4(self.layer3(self.layer2(stage1)))


def load_pretrained(backbone: ResNet, source: str) -> None:
    """Load ImageNet weights into `backbone`, from timm's hub (`source="timm"`) or from a v1c file's path.

    A first convolution of 3 channels is summed over its input channels when the network has one.
    Raises UserError, naming the keys, when anything but `fc.*` does not fit.
    """
    state = _timm_weights() if source == "timm" else _file_weights(Path(source))
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    own = backbone.state_dict()
    stem = "conv1.0.weight"
    if stem in state and state[stem].shape[1:2] == (3,) and own[stem].shape[1] == 1:
        state[stem] = state[stem].sum(dim=1, keepdim=True)
    # Files older than PyTorch 0.4.1 lack the batch counters, which only a momentum of None would use.
    state |= {key: value for key, value in own.items() if key.endswith("num_batches_tracked") and key not in state}
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, the network wants {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        raise UserError(
            f"pretrained weights {source!r} do not fit the backbone, a ResNet-50 with the deep stem 64/64/128 "
            f"(timm's resnet50s, or resnet50_v1c): {len(problems)} keys differ:\n  " + "\n  ".join(problems[:12])
        )
    backbone.load_state_dict(state)


def _timm_weights() -> dict[str, torch.Tensor]:
    try:
        return timm.create_model(TIMM_NAME, pretrained=True).state_dict()
    except Exception as error:  # timm raises whatever its download layers raise: offline, proxy, missing cache
        raise UserError(
            f"the pretrained weights {TIMM_NAME} are neither in the local cache nor to be downloaded "
            f"({type(error).__name__}). Run once on a machine with a network and copy its Hugging Face cache, or "
            "give a local file: --pretrained path/to/resnet50_v1c.pth, or train from scratch: --pretrained none"
        ) from error


def _file_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"--pretrained {path}: no such file (choose 'timm', 'none' or the path of a v1c file)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file or one with pickled code: never executed
        raise UserError(f"{path} is not a plain PyTorch state dict: {first_line(error)}") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    if not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} is not a plain PyTorch state dict: it does not map names to tensors")
    return dict(content)
