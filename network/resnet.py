"""The dilated ResNet-50 backbone, made of timm's blocks, and its pretrained weights."""

import itertools
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError, naming

TIMM_NAME = "resnet50s.gluon_in1k"  # ResNet-50 with the deep stem 64, 64, 128


class AtrousConv2d(nn.Conv2d):
    """A 3x3 convolution with dilation = padding = `rate`, without bias, that keeps the map's size.

    With a large rate the outer taps read mostly padding. There each tap is a matrix product on what it
    reads of the map: less work, and no copies of all weights in a CPU's backward pass
    (docs/benchmark.md). GPUs, not measured, do so only where the outer taps read nothing else.
    """

    def __init__(self, in_channels: int, out_channels: int, rate: int):
        super().__init__(in_channels, out_channels, 3, padding=rate, dilation=rate, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (height, width), rate = x.shape[-2:], self.dilation[0]
        if max(height, width) > rate * (2 if x.device.type == "cpu" else 1):
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
    """ResNet-50 with a deep stem, dilated as in Chen et al. 2018, DeepLabv3+.

    (B, 1, H, W) -> stage 1 (B, 256, H/4, W/4), stage 4 (B, 2048, H/16, W/16).
    State-dict keys equal those of timm's `resnet50s` without `fc`.
    """

    def __init__(self):
        super().__init__()
        net = timm.create_model("resnet50s", in_chans=1, num_classes=0, output_stride=16)
        for block, rate in zip(net.layer4, (2, 4, 8), strict=True):
            plain = block.conv2
            block.conv2 = AtrousConv2d(plain.in_channels, plain.out_channels, rate)
            block.conv2.load_state_dict(plain.state_dict())  # timm's initialisation
        for name in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(net, name))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stage1 = self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(x)))))
        return stage1, self.layer4(self.layer3(self.layer2(stage1)))


def load_pretrained(backbone: ResNet, source: str) -> None:
    """Load ImageNet weights, less `fc.*`, into `backbone`; source and errors as in `build_network`."""
    state = {key: value for key, value in _pretrained_weights(source).items() if not key.startswith("fc.")}
    stem = "conv1.0.weight"
    if stem in state and state[stem].shape[1:2] == (3,):  # RGB to grey
        state[stem] = state[stem].sum(dim=1, keepdim=True)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"pretrained weights {source!r} do not fit the backbone, a ResNet-50 with the deep stem 64/64/128 "
            f"(timm's resnet50s, or resnet50_v1c)\n{str(error)[:2000]}"
        ) from error


def _pretrained_weights(source: str) -> dict[str, torch.Tensor]:
    if source == "timm":
        ways = (
            ". Run once on a machine with a network and copy its Hugging Face cache, or give a local file: "
            "--pretrained path/to/resnet50_v1c.pth, or train from scratch: --pretrained none"
        )
        absent = "are neither in the local cache nor to be downloaded"
        with naming(f"the pretrained weights {TIMM_NAME}", absent, remedy=ways):
            return timm.create_model(TIMM_NAME, pretrained=True).state_dict()
    if not Path(source).is_file():
        raise UserError(f"--pretrained {source}: no such file (choose 'timm', 'none' or the path of a v1c file)")
    with naming(source, "is not a plain PyTorch state dict"):  # pickled code is never executed
        content = torch.load(source, map_location="cpu", weights_only=True)
        content = content.get("state_dict", content) if isinstance(content, dict) else None
        if not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise ValueError("it does not map names to tensors")
        return content
