"""DeepLabv3+: head and whole network; keys equal the method's released checkpoints."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

from network.resnet import AtrousConv2d, ResNet, load_pretrained


def build_network(num_classes: int, pretrained: str = "none") -> nn.Module:
    """Build one of the two networks: (B, 1, H, W) -> logits (B, num_classes, H, W).

    Classes are in the order of the label values, with the background; with 4 it has 40.47 M parameters.
    `pretrained` is "none", "timm" (ImageNet weights by timm) or the path of a `resnet50_v1c.pth`. Raises
    UserError when the weights cannot be had or do not fit.
    """
    network = DeepLabV3Plus(num_classes)
    if pretrained != "none":
        load_pretrained(network.backbone, pretrained)
    return network


def _resize(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: (B, 2048, h, w) -> (B, 256, h, w)."""

    def __init__(self):
        super().__init__()
        self.map_convs = nn.ModuleList([nn.Conv2d(2048, 256, 1, bias=False)])
        self.map_convs.extend(AtrousConv2d(2048, 256, rate) for rate in (6, 12, 18))
        self.map_bn = nn.BatchNorm2d(1024)
        self.global_pooling_conv = nn.Conv2d(2048, 256, 1, bias=False)
        self.global_pooling_bn = nn.BatchNorm2d(256)
        self.red_conv = nn.Conv2d(1024, 256, 1, bias=False)
        self.pool_red_conv = nn.Conv2d(256, 256, 1, bias=False)
        self.red_bn = nn.BatchNorm2d(256)
        self.activation = nn.LeakyReLU(0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.activation(self.map_bn(torch.cat([conv(x) for conv in self.map_convs], dim=1)))
        pooled = self.global_pooling_conv(x.mean(dim=(2, 3), keepdim=True))
        pooled = self.pool_red_conv(self.activation(self.global_pooling_bn(pooled)))
        return self.activation(self.red_bn(self.red_conv(maps) + pooled))


class Head(nn.Module):
    """ASPP and decoder: (B, 256, H/4, W/4), (B, 2048, H/16, W/16) -> (B, 256, H/4, W/4)."""

    def __init__(self):
        super().__init__()
        self.aspp = ASPP()
        self.reduce = nn.Sequential(*Conv2dNormActivation(256, 48, 1))
        first, second = (Conv2dNormActivation(channels, 256) for channels in (304, 256))
        self.last_conv = nn.Sequential(*first, nn.Dropout2d(0.1), *second)

    def forward(self, stage1: torch.Tensor, stage4: torch.Tensor) -> torch.Tensor:
        reduced = self.reduce(stage1)
        return self.last_conv(torch.cat([_resize(self.aspp(stage4), like=reduced), reduced], dim=1))


class DeepLabV3Plus(nn.Module):
    """The whole network, from the image to the logits."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.backbone = ResNet()
        self.head = Head()
        self.classifier = nn.Conv2d(256, num_classes, 1)
        for module in (*self.head.modules(), self.classifier):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return _resize(self.classifier(self.head(*self.backbone(image))), like=image)
