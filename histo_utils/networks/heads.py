"""Generalised-mean pooling, and heads that pool four maps into one vector.

References
----------
Nuñez-Fernández et al., LGFFEM, Sensors 2025; details as in camilo-nunez/ffnir.
GeM: Radenović et al., Fine-tuning CNN image retrieval with no human annotation,
TPAMI 2019.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from histo_utils.networks.published_names import load_renamed


class GeM(nn.Module):
    """Generalised-mean pooling, (mean of max(x, eps)^p)^(1/p) a channel.

    p = 1 is the mean of the clamped map, a large p nears the maximum. The clamp drops
    all negative activations.

    Parameters
    ----------
    p : float
        Exponent at the start; it is learned.
    eps : float
        Smallest activation.
    """

    def __init__(self, p: float = 4.6, eps: float = 1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([float(p)]))
        self.eps = eps

    def forward(self, x):
        """Return (b, c) of a map (b, c, h, w)."""
        return x.clamp(min=self.eps).pow(self.p).mean((2, 3)).pow(1 / self.p)


class ScaleHead(nn.Module):
    """Pool one scale's map into its part of the embedding.

    Parameters
    ----------
    channels : int
    p, dropout : float
        As in `MultiScaleGeMHead`.
    """

    def __init__(self, channels: int, p: float, dropout: float):
        super().__init__()
        self.pool = GeM(p)
        self.norm = nn.BatchNorm1d(channels)
        self.dropout = nn.Dropout(dropout)
        self.embed = nn.Linear(channels, channels)
        self.rescale = nn.Linear(channels, channels)

    def forward(self, x):
        """Return (b, channels) of a map (b, channels, h, w)."""
        x = self.embed(self.dropout(self.norm(self.pool(x))))
        return self.rescale(F.normalize(x, dim=1))


class MultiScaleGeMHead(nn.Module):
    """Pool each of four maps into a quarter of the embedding (LGFFEM 2025).

    A scale: GeM, batch norm, dropout, linear, unit length, linear. As published the
    last linear layer leaves the scales with different lengths, and a search by
    Euclidean distance mixes length and angle; ``normalise`` mends that.

    2,105,348 parameters for 512 channels, which give 2048 dimensions.

    Parameters
    ----------
    channels : int
    p : float
        Of `GeM`, at the start.
    dropout : float
    normalise : bool
        Whether the whole vector gets unit length at the end; ours, not the paper's.
    """

    def __init__(
        self,
        channels: int,
        p: float = 4.6,
        dropout: float = 0.6,
        normalise: bool = False,
    ):
        super().__init__()
        self.normalise = normalise
        self.scales = nn.ModuleList(ScaleHead(channels, p, dropout) for _ in range(4))

    def forward(self, maps):
        """Return (b, 4 · channels) of four maps (b, channels, h_i, w_i)."""
        parts = [head(x) for head, x in zip(self.scales, maps, strict=True)]
        x = torch.cat(parts, 1)
        return F.normalize(x, dim=1) if self.normalise else x

    def load_published(self, state_dict: Mapping[str, torch.Tensor]):
        """Load the authors' weights: their names with or without ``head.``.

        Raises
        ------
        ValueError
            If names are unknown or missing, or shapes differ.
        """
        load_renamed(self, state_dict, "head")
        return self
