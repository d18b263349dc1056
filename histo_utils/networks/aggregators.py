"""Blocks of the local-global fusion neck (LGFFEM 2025).

A map x is weighed by a mask z that it gives itself:
``(1 - a) · x · sigmoid(z) + a · x`` with one learned number a, 0 at the start. The
local aggregator's mask sees one place only, the global one's a neighbourhood and,
through its response normalisation, the whole map.

References
----------
Nuñez-Fernández et al., LGFFEM, Sensors 2025; details as in camilo-nunez/ffnir.
GRN: Woo et al., ConvNeXt V2, CVPR 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# The axis over which the responses of a (b, c, h, w) map are averaged.
GRN_AXES = {"channel": 1, "as_published": -1}


class GRN(nn.Module):
    """Global response normalisation: γ · x · N + β + x.

    N is a channel's response (its Euclidean norm over the map) relative to the mean
    response of all channels. The released code takes the mean over the last axis, which
    has one entry there, so that N is 1 within 4e-7 and nothing is normalised.

    Parameters
    ----------
    channels : int
    mode : {"channel", "as_published"}
        The mean over channels, or the one as released.

    Raises
    ------
    ValueError
        For another mode.
    """

    def __init__(self, channels: int, mode: str = "channel"):
        super().__init__()
        if mode not in GRN_AXES:
            raise ValueError(f"grn={mode!r}; expected one of {', '.join(GRN_AXES)}")
        self.axis = GRN_AXES[mode]
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        """Return the normalised map; (b, c, h, w) to the same."""
        response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        relative = response / (response.mean(self.axis, keepdim=True) + 1e-6)
        return self.gamma * (x * relative) + self.beta + x


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place of a map (b, c, h, w)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        """Return the normalised map; (b, c, h, w) to the same."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Projection(nn.Module):
    """Bring a backbone's map to the neck's channels, through half the input's.

    Parameters
    ----------
    in_channels, channels : int
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)
        self.norm = ChannelNorm(in_channels // 2)
        self.expand = nn.Conv2d(in_channels // 2, channels, 1)

    def forward(self, x):
        """Return (b, channels, h, w) of (b, in_channels, h, w)."""
        return self.expand(F.gelu(self.norm(self.squeeze(x))))


class LocalAggregator(nn.Module):
    """Weigh a map by a mask from each place alone; optionally after doubling its size.

    Parameters
    ----------
    channels : int
    upsample : bool
        Whether layer norm and a depth-wise transposed 2×2 convolution come first.
    """

    def __init__(self, channels: int, upsample: bool = False):
        super().__init__()
        self.resize = None
        if upsample:
            double = nn.ConvTranspose2d(channels, channels, 2, 2, groups=channels)
            self.resize = nn.Sequential(ChannelNorm(channels), double)
        self.norm = ChannelNorm(channels)
        self.squeeze = nn.Conv2d(channels, channels // 2, 1)
        self.expand = nn.Conv2d(channels // 2, channels, 1)
        self.keep = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        """Return (b, c, h, w), or (b, c, 2h, 2w) where it upsamples."""
        if self.resize is not None:
            x = self.resize(x)
        mask = self.expand(F.gelu(self.squeeze(self.norm(x))))
        return (1 - self.keep) * x * torch.sigmoid(mask) + self.keep * x


class GlobalAggregator(nn.Module):
    """Weigh a map by a mask from its surroundings; optionally after halving its size.

    Parameters
    ----------
    channels : int
    downsample : bool
        Whether a depth-wise 3×3 convolution of stride 2 and layer norm come first.
    grn : {"channel", "as_published"}
        See `GRN`.
    """

    def __init__(self, channels: int, downsample: bool = False, grn: str = "channel"):
        super().__init__()
        self.resize = None
        if downsample:
            self.resize = nn.Sequential(
                _depthwise(channels, stride=2), ChannelNorm(channels)
            )
        self.depthwise = _depthwise(channels)
        self.norm = ChannelNorm(channels)
        self.squeeze = nn.Conv2d(channels, channels // 2, 1)
        self.grn = GRN(channels // 2, grn)
        self.expand = nn.Conv2d(channels // 2, channels, 1)
        self.keep = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        """Return (b, c, h, w), or (b, c, h/2, w/2) where it downsamples."""
        if self.resize is not None:
            x = self.resize(x)
        mask = F.gelu(self.squeeze(self.norm(self.depthwise(x))))
        mask = self.expand(self.grn(mask))
        return (1 - self.keep) * x * torch.sigmoid(mask) + self.keep * x


def _depthwise(channels, stride=1):
    return nn.Conv2d(
        channels, channels, 3, stride, padding=1, groups=channels, bias=False
    )
