"""Residual networks with attention inside (Yang et al. 2019).

Two kinds of attention are mixed: squeeze-and-excitation weighs the channels within each
block, and a sigmoid mask weighs every channel at every place of the third stage's map
(details as in easonyang1996/DML_HistoImgRetrieval, commit 9b01805).
"""

import torch.nn.functional as F
from timm.layers import SEModule
from torch import nn

from histo_utils.networks.ensemble import learner_dim

EXPANSION = 4  # a bottleneck's output has four times its inner width
REDUCTION = 16  # of the channels inside squeeze-and-excitation


class Bottleneck(nn.Module):
    """Residual block 1×1, 3×3 (with the stride), 1×1 to ``4 * width`` channels."""

    # timm's legacy_seresnet50 has the same shapes with the stride on the first 1×1: its
    # weights load, but mean a slightly different network.
    def __init__(self, in_channels, width, stride=1, reduction=None):
        super().__init__()
        out = EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.se_module = None
        if reduction:
            self.se_module = SEModule(out, rd_channels=out // reduction)
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

    Stem (7×7/2 conv, 3×3/2 max-pool, rounding up) and stages of 3, 4 and 6 SE
    bottlenecks give the map X, 1024 × 14 × 14 for 224 px; 3 more, 1×1 conv, BN and
    sigmoid give the mask A. A last stage of 3 takes X · A; then the mean, a linear
    layer, unit length. 45,731,440 parameters for 512 dimensions, 27,088,112 without the
    mask. Images may have any size; the released 7×7 pool needs 224 px.

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
    """ResNet-50 whose learners share all but their mask (Yang et al. 2019)."""

    # 47,131,840 parameters for 4 learners of 512 dimensions together. The shared
    # attention runs once, in the released code per learner: running means there move
    # more often.
    def __init__(self, learners: int = 4, dim: int = 512):
        super().__init__()
        share = learner_dim(learners, dim)
        self.stem = _stem()
        self.stage1 = _stage(64, 64, 3, 1)
        self.stage2 = _stage(256, 128, 4, 2)
        self.stage3 = _stage(512, 256, 6, 2)
        self.attention = _stage(1024, 512, 3, 1)
        self.masks = nn.ModuleList(_sigmoid_mask() for _ in range(learners))
        self.stage4 = _stage(1024, 512, 3, 2)
        self.embed = nn.Linear(2048, share)

    def forward(self, x):
        """Return a list of unit vectors (b, dim / learners), one per learner."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        attention = self.attention(x)
        maps = [self.stage4(x * mask(attention)) for mask in self.masks]
        return [F.normalize(self.embed(m.mean((2, 3))), dim=1) for m in maps]


def _stem():
    conv = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU(), pool)


def _stage(in_channels, width, blocks, stride, reduction=None):
    """Bottlenecks of one width; the first one takes the stride."""
    first = Bottleneck(in_channels, width, stride, reduction)
    out = EXPANSION * width
    rest = (Bottleneck(out, width, 1, reduction) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _sigmoid_mask():
    conv = nn.Conv2d(2048, 1024, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(1024), nn.Sigmoid())
