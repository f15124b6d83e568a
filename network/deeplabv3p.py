"""DeepLabv3+ head (ASPP and decoder) and the whole network; keys equal the method's released checkpoints."""

import torch
import torch.nn.functional as F
from torch import nn

from network.resnet import AtrousConv2d, ResNet, load_pretrained


def build_network(num_classes: int, in_channels: int = 1, pretrained: str = "none") -> nn.Module:
    """Build one of the two networks.

    Args:
        num_classes: classes including the background, in the order of the label values.
        in_channels: channels of the input image.
        pretrained: "none", "timm" (ImageNet weights by timm) or the path of a `resnet50_v1c.pth`.

    Returns:
        A module, (B, in_channels, H, W) -> logits (B, num_classes, H, W); 40.47 M parameters with 4 classes.

    Raises:
        UserError: the pretrained weights cannot be had or do not fit.
    """
    network = DeepLabV3Plus(num_classes, in_channels)
    if pretrained != "none":
        load_pretrained(network.backbone, pretrained)
    return network


def _conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def _resize(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: (B, 2048, h, w) -> (B, 256, h, w)."""

    def __init__(self, in_channels: int = 2048, channels: int = 256, rates: tuple[int, ...] = (6, 12, 18)):
        super().__init__()
        branches = [nn.Conv2d(in_channels, channels, 1, bias=False)]
        branches += [AtrousConv2d(in_channels, channels, rate) for rate in rates]
        self.map_convs = nn.ModuleList(branches)
        self.map_bn = nn.BatchNorm2d(channels * len(branches))
        self.global_pooling_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.global_pooling_bn = nn.BatchNorm2d(channels)
        self.red_conv = nn.Conv2d(channels * len(branches), channels, 1, bias=False)
        self.pool_red_conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.red_bn = nn.BatchNorm2d(channels)
        self.activation = nn.LeakyReLU(0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.activation(self.map_bn(torch.cat([conv(x) for conv in self.map_convs], dim=1)))
        pooled = self.global_pooling_conv(x.mean(dim=(2, 3), keepdim=True))
        pooled = self.pool_red_conv(self.activation(self.global_pooling_bn(pooled)))
        return self.activation(self.red_bn(self.red_conv(maps) + pooled))


class Head(nn.Module):
    """ASPP and decoder: stage 1 (B, 256, H/4, W/4), stage 4 (B, 2048, H/16, W/16) -> (B, 256, H/4, W/4)."""

    def __init__(self):
        super().__init__()
        self.aspp = ASPP()
        self.reduce = nn.Sequential(*_conv_bn_relu(256, 48, 1))
        self.last_conv = nn.Sequential(*_conv_bn_relu(304, 256, 3), nn.Dropout2d(0.1), *_conv_bn_relu(256, 256, 3))

    def forward(self, stage1: torch.Tensor, stage4: torch.Tensor) -> torch.Tensor:
        reduced = self.reduce(stage1)
        return self.last_conv(torch.cat([_resize(self.aspp(stage4), like=reduced), reduced], dim=1))


class DeepLabV3Plus(nn.Module):
    """The whole network: image (B, C, H, W) -> logits (B, num_classes, H, W)."""

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.backbone = ResNet(in_channels)
        self.head = Head()
        self.classifier = nn.Conv2d(256, num_classes, 1)
        for part in (self.head, self.classifier):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return _resize(self.classifier(self.head(*self.backbone(image))), like=image)
