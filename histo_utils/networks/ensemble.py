"""An ensemble of learners that share one GoogLeNet (ABE-M in Yang et al. 2019).

After Kim et al., Attention-based ensemble for deep metric learning, ECCV 2018.
"""

import torch
import torch.nn.functional as F
from torch import nn

# GoogLeNet's widths: 1×1 | before 3×3, 3×3 | before 5×5, 5×5 | after the pool
WIDTHS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
STAGE4 = ("4a", "4b", "4c", "4d", "4e")


class Inception(nn.Module):
    """Four branches side by side, of the widths of `WIDTHS`; height and width stay."""

    def __init__(self, in_channels, one, three_in, three, five_in, five, pooled):
        super().__init__()
        c = in_channels
        self.branches = nn.ModuleList([
            nn.Sequential(*_conv(c, one, 1)),
            nn.Sequential(*_conv(c, three_in, 1), *_conv(three_in, three, 3)),
            nn.Sequential(*_conv(c, five_in, 1), *_conv(five_in, five, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, padding=1), *_conv(c, pooled, 1)),
        ])  # fmt: skip

    def forward(self, x):
        """Return the branches' maps, one after the other."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class ABEM(nn.Module):
    """Attention-based ensemble on GoogLeNet with batch norm (Yang et al. 2019).

    Inception 3a and 3b give the features, 480 × 14 × 14 for 224 px. Copies of 4a to 4e
    give the shared attention, from which a 1×1 conv, BN and ReLU make each learner's
    mask (it may also magnify). Features · mask pass 4a to 5b, the mean, dropout of
    channels and a linear layer to unit length, all shared. 10,534,720 parameters for 4
    learners. Pools are 3×3/2 and round up as in GoogLeNet (how the released ones treat
    their border was not recorded: ours).

    Parameters
    ----------
    learners : int
    dim : int
        Length of all learners' embeddings together.
    dropout : float

    Raises
    ------
    ValueError
        If the learners cannot share ``dim`` evenly.
    """

    def __init__(self, learners: int = 4, dim: int = 512, dropout: float = 0.4):
        super().__init__()
        share = learner_dim(learners, dim)
        self.stem = nn.Sequential(
            *_conv(3, 64, 7, stride=2), _pool(), *_conv(64, 192, 3), _pool()
        )
        self.stage3 = nn.Sequential(*_inceptions(192, "3a", "3b"), _pool())
        self.attention = nn.Sequential(*_inceptions(480, *STAGE4))
        self.masks = nn.ModuleList(
            nn.Sequential(*_conv(832, 480, 1)) for _ in range(learners)
        )
        self.stage4 = nn.Sequential(*_inceptions(480, *STAGE4), _pool())
        self.stage5 = nn.Sequential(*_inceptions(832, "5a", "5b"))
        self.dropout = nn.Dropout2d(dropout)
        self.embed = nn.Linear(1024, share)

    def forward(self, x):
        """Return a list of unit vectors (b, dim / learners), one per learner."""
        features = self.stage3(self.stem(x))
        attention = self.attention(features)
        return [self._learn(features * mask(attention)) for mask in self.masks]

    def _learn(self, x):
        x = F.adaptive_avg_pool2d(self.stage5(self.stage4(x)), 1)
        return F.normalize(self.embed(self.dropout(x).flatten(1)), dim=1)


def learner_dim(learners, dim):
    """Length of one learner's embedding, where all learners together have ``dim``."""
    if learners < 1 or dim % learners:
        raise ValueError(
            f"{dim} dimensions cannot be shared by {learners} learners; choose dim as "
            "a multiple of learners"
        )
    return dim // learners


def _conv(in_channels, out_channels, kernel, stride=1):
    """Convolution with bias that keeps the size but for its stride, BN, ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()


def _pool():
    return nn.MaxPool2d(3, 2, ceil_mode=True)


def _inceptions(in_channels, *names):
    for name in names:
        one, _, three, _, five, pooled = WIDTHS[name]
        yield Inception(in_channels, *WIDTHS[name])
        in_channels = one + three + five + pooled
