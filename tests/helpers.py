"""What several tests share: where the project lies, and a small stand-in for the network."""

from pathlib import Path

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
