"""Residual networks with attention inside (Yang et al. 2019).

Two kinds of attention are mixed: squeeze-and-excitation weighs the channels within each
block, and a sigmoid mask weighs every channel at every place of the third stage's map.

References
----------
Yang et al., Liver histopathological image retrieval based on deep metric learning,
BIBM 2019; details as in easonyang1996/DML_HistoImgRetrieval, commit 9b01805.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

EXPANSION = 4  # a bottleneck's output has four times its inner width
REDUCTION = 16  # of the channels inside squeeze-and-excitation


class SqueezeExcitation(nn.Module):
    """Weigh each channel by a gate computed from the means of all channels.

    Parameters
    ----------
    channels : int
    reduction : int
        The gate's inner layer has ``channels // reduction`` units.
    """

    def __init__(self, channels: int, reduction: int = REDUCTION):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x):
        """Return the weighed map; (b, c, h, w) to the same."""
        means = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(means))))


class Bottleneck(nn.Module):
    """Residual block 1×1, 3×3, 1×1; the stride is on the 3×3.

    timm's ``legacy_seresnet50`` has the same shapes with the stride on the first 1×1:
    its weights load, but mean a slightly different network.

    Parameters
    ----------
    in_channels, width : int
        The output has ``4 * width`` channels.
    stride : int
    reduction : int or None
        Of the squeeze-and-excitation after the third batch norm; None leaves it out.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        reduction: int | None = None,
    ):
        super().__init__()
        out = EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.se_module = SqueezeExcitation(out, reduction) if reduction else None
        self.downsample = None
        if stride > 1 or in_channels != out:
            project = nn.Conv2d(in_channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(out))

    def forward(self, x):
        """Return (b, 4 · width, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.se_module is not None:
            y = self.se_module(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(y + shortcut)


class MixedAttentionSEResNet50(nn.Module):
    """SE-ResNet-50 with an attention mask after its third stage (Yang et al. 2019).

    ======== ================================================== ==================
    part     layers                                             output for 224 px
    ======== ================================================== ==================
    stem     7×7/2 conv, BN, ReLU; max-pool 3×3/2, rounding up  64 × 56 × 56
    stage1   3 SE bottlenecks                                   256 × 56 × 56
    stage2   4, stride 2                                        512 × 28 × 28
    stage3   6, stride 2: the map X                             1024 × 14 × 14
    mask     3, stride 1; 1×1 conv, BN, sigmoid: the mask A     1024 × 14 × 14
    stage4   3, stride 2, on X · A                              2048 × 7 × 7
    embed    mean over the map, linear, unit length             dim
    ======== ================================================== ==================

    45,731,440 parameters for 512 dimensions, 27,088,112 without the mask. The mean is
    over whatever map there is; the released 7×7 pool fails for other sizes than 224.

    Parameters
    ----------
    dim : int
        Length of the embedding.
    attention : bool
        Whether the mask is there; without it stage 4 takes X itself.
    """

    def __init__(self, dim: int = 512, attention: bool = True):
        super().__init__()
        self.stem = _stem()
        self.stage1 = _stage(64, 64, 3, 1, REDUCTION)
        self.stage2 = _stage(256, 128, 4, 2, REDUCTION)
        self.stage3 = _stage(512, 256, 6, 2, REDUCTION)
        self.mask = None
        if attention:
            tower = _stage(1024, 512, 3, 1, REDUCTION)
            self.mask = nn.Sequential(*tower, *_sigmoid_mask())
        self.stage4 = _stage(1024, 512, 3, 2, REDUCTION)
        self.embed = nn.Linear(2048, dim)

    def forward(self, x):
        """Return unit vectors (b, dim) of images (b, 3, h, w)."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        if self.mask is not None:
            x = x * self.mask(x)
        x = self.stage4(x).mean((2, 3))
        return F.normalize(self.embed(x), dim=1)


class BranchedAttentionResNet50(nn.Module):
    """ResNet-50 whose learners differ in their attention mask only (Yang et al. 2019).

    As `MixedAttentionSEResNet50` without squeeze-and-excitation. The three blocks of
    the attention are shared; each learner has its own 1×1 conv, BN and sigmoid (2048 to
    1024 channels), and shares stage 4 and the linear layer with the others. The shared
    attention is computed once; the released code runs it once a learner, with the same
    outcome but for how often its running means move.

    47,131,840 parameters for 4 learners of 128 dimensions.

    Parameters
    ----------
    learners : int
    dim : int
        Length of each learner's embedding.
    """

    def __init__(self, learners: int = 4, dim: int = 128):
        super().__init__()
        self.stem = _stem()
        self.stage1 = _stage(64, 64, 3, 1)
        self.stage2 = _stage(256, 128, 4, 2)
        self.stage3 = _stage(512, 256, 6, 2)
        self.attention = _stage(1024, 512, 3, 1)
        self.masks = nn.ModuleList(_sigmoid_mask() for _ in range(learners))
        self.stage4 = _stage(1024, 512, 3, 2)
        self.embed = nn.Linear(2048, dim)

    def forward(self, x):
        """Return a list of unit vectors (b, dim), one a learner."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        attention = self.attention(x)
        maps = [self.stage4(x * mask(attention)) for mask in self.masks]
        return [F.normalize(self.embed(m.mean((2, 3))), dim=1) for m in maps]


def _stem():
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
    )


def _stage(in_channels, width, blocks, stride, reduction=None):
    """Bottlenecks of one width; the first one takes the stride."""
    first = Bottleneck(in_channels, width, stride, reduction)
    out = EXPANSION * width
    rest = (Bottleneck(out, width, 1, reduction) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _sigmoid_mask():
    conv = nn.Conv2d(2048, 1024, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(1024), nn.Sigmoid())
