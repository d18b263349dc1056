"""A small convolutional network of our own design, trained from scratch.

KimiaNet's authors compare with small conv-BN-ReLU ("CBR") networks whose layers they do
not give, and Kieffer et al. with a network from scratch. This one stands in for both
and reproduces neither.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class CBRNet(nn.Module):
    """Convolution, batch norm and ReLU, a few times; then the mean and a linear layer.

    Each stage is one 3×3 convolution without bias, batch norm, ReLU and a 2×2 max-pool
    that rounds up; stage i gives ``widths[i]`` channels at 1 / 2^(i+1) of the size.

    ==================== ========================== ============
    widths               outputs                    parameters
    ==================== ========================== ============
    (32, 64, 128, 256)   256 features               388,896
    (32, 64, 128, 256)   24 classes                 395,064
    ==================== ========================== ============

    Parameters
    ----------
    widths : sequence of int
        Channels after each stage.
    dim : int or None
        Length of the output: classes or dimensions of an embedding, linear, not
        normalised. None gives the pooled features themselves.

    Raises
    ------
    ValueError
        If there is no stage.
    """

    def __init__(
        self, widths: Sequence[int] = (32, 64, 128, 256), dim: int | None = None
    ):
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
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
    )
