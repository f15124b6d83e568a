"""The segmentation network: DeepLabv3+ on a dilated ResNet-50 with a deep stem."""

from network.deeplabv3p import build_network

__all__ = ["build_network"]
