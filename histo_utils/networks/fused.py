"""A frozen backbone, the fusion neck and its heads, as one network (LGFFEM)."""

from __future__ import annotations

import torch


class Fusion(torch.nn.Module):
    """Four feature maps of a frozen backbone, fused and pooled to one vector.

    The backbone takes no gradient and stays in evaluation mode whatever ``train`` is
    told, so its batch norm statistics never move; the authors set the whole model to
    training mode, which differs for backbones with batch norm or drop path.

    Parameters
    ----------
    backbone : torch.nn.Module
        (b, 3, h, w) in, a list of 4 maps (b, c_i, h_i, w_i) out, fine to coarse, each
        half as wide as the one before; timm's ``features_only``.
    neck : torch.nn.Module
        4 maps in, 4 maps of C channels out; `LocalGlobalFusionNeck`.
    head : torch.nn.Module
        4 maps in, (b, 4 C) vectors out; `MultiScaleGeMHead`.
    channels : int
        C.

    Attributes
    ----------
    dimension : int
        Length of a vector, 4 C.

    References
    ----------
    Nuñez-Fernández et al., LGFFEM, Sensors 2025.
    """

    def __init__(self, backbone, neck, head, channels):
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.neck, self.head = neck, head
        self.dimension = 4 * channels

    def train(self, mode=True):
        """Set neck and head to training mode; the backbone stays in evaluation."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        """Return (b, 4 C) vectors of (b, 3, h, w) images."""
        with torch.no_grad():
            maps = self.backbone(x)
        return self.head(self.neck(maps))
