"""A small convolutional network of our own design, trained from scratch.

KimiaNet's authors compare with small conv-BN-ReLU ("CBR") networks whose layers they do
not give, and Kieffer et al. with a network from scratch. This one stands in for both
and reproduces neither.
"""

from torch import nn


class CBRNet(nn.Module):
    """Per width: 3×3 conv, BN, ReLU, 2×2 max-pool; the mean; linear if ``dim``."""

    # widths (32, 64, 128, 256): 388,896 parameters, 395,064 with 24 classes
    def __init__(self, widths=(32, 64, 128, 256), dim=None):
        super().__init__()
        if not widths:
            raise ValueError("CBRNet without widths; give the channels of each stage")
        inputs = (3, *widths[:-1])
        self.stages = nn.Sequential(
            *(_stage(i, o) for i, o in zip(inputs, widths, strict=True))
        )
        self.head = nn.Identity() if dim is None else nn.Linear(widths[-1], dim)

    def forward(self, x):
        """Return (b, dim), or (b, widths[-1]) without dim, of images (b, 3, h, w)."""
        return self.head(self.stages(x).mean((2, 3)))


def _stage(in_channels, out_channels):
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    pool = nn.MaxPool2d(2, ceil_mode=True)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(), pool)
