"""Local-global feature fusion of a backbone's four maps (LGFFEM 2025).

A frozen backbone gives maps at four scales; the neck passes context down from coarse to
fine and up again (a graph as in EfficientDet).

References
----------
Nuñez-Fernández et al., LGFFEM, Sensors 2025; details as in camilo-nunez/ffnir.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from histo_utils.networks.aggregators import (
    GlobalAggregator,
    LocalAggregator,
    Projection,
)
from histo_utils.networks.published_names import load_renamed


class FusionNode(nn.Module):
    """Weighted sum of several maps, each through its own aggregator.

    Weights are w_i / (Σ w + 1e-4) with learned w, 1 at the start. As in the released
    code nothing keeps them positive.

    Parameters
    ----------
    *paths : torch.nn.Module
        One aggregator a map; all bring their map to one shape.
    """

    def __init__(self, *paths: nn.Module):
        super().__init__()
        self.paths = nn.ModuleList(paths)
        self.weights = nn.Parameter(torch.ones(len(paths)))

    def forward(self, *maps):
        """Return the sum, (b, c, h, w)."""
        weights = self.weights / (self.weights.sum() + 1e-4)
        parts = zip(weights, self.paths, maps, strict=True)
        return sum(w * path(x) for w, path, x in parts)


class FusionLayer(nn.Module):
    """One pass over the four scales: coarse to fine, then fine to coarse.

    Parameters
    ----------
    channels : int
    grn : {"channel", "as_published"}
    in_channels : sequence of four int, optional
        Of the backbone's maps, finest first, where this is the first layer.
    """

    def __init__(
        self,
        channels: int,
        grn: str,
        in_channels: Sequence[int] | None = None,
    ):
        super().__init__()

        def near():
            return LocalAggregator(channels)

        def wide():
            return GlobalAggregator(channels, grn=grn)

        def up():
            return LocalAggregator(channels, upsample=True)

        def down():
            return GlobalAggregator(channels, downsample=True, grn=grn)

        self.project = None
        if in_channels is not None:
            self.project = nn.ModuleList(Projection(c, channels) for c in in_channels)
        self.inner3 = FusionNode(wide(), up())
        self.inner2 = FusionNode(wide(), up())
        self.out1 = FusionNode(wide(), up())
        self.out2 = FusionNode(near(), near(), down())
        self.out3 = FusionNode(near(), near(), down())
        self.out4 = FusionNode(near(), down())

    def forward(self, maps):
        """Return four maps (b, channels, h, w), finest first, sizes as they came."""
        if self.project is not None:
            maps = [p(x) for p, x in zip(self.project, maps, strict=True)]
        p1, p2, p3, p4 = maps
        inner3 = self.inner3(p3, p4)
        inner2 = self.inner2(p2, inner3)
        out1 = self.out1(p1, inner2)
        out2 = self.out2(p2, inner2, out1)
        out3 = self.out3(p3, inner3, out2)
        out4 = self.out4(p4, out3)
        return [out1, out2, out3, out4]


class LocalGlobalFusionNeck(nn.Module):
    """Fuse a backbone's four maps, several layers deep (LGFFEM 2025).

    For ConvNeXt V2 base at 224 px the maps have 128, 256, 512 and 1024 channels at 56,
    28, 14 and 7 px; the paper's neck (512 channels, 3 layers) gives 512 at the same
    sizes with 12,452,308 parameters.

    Parameters
    ----------
    in_channels : sequence of four int
        Of the backbone's maps, finest first.
    channels : int
        Of all maps that come out.
    num_layers : int
    grn : {"channel", "as_published"}
        Response normalisation as meant, or as released, where it does nothing.

    Raises
    ------
    ValueError
        If there are not four maps, no layer, or an unknown ``grn``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 512,
        num_layers: int = 3,
        grn: str = "channel",
    ):
        super().__init__()
        if len(in_channels) != 4 or num_layers < 1:
            raise ValueError(
                f"{len(in_channels)} maps and {num_layers} layers; the neck takes four "
                "maps and one layer or more"
            )
        self.published = grn == "as_published"
        self.layers = nn.ModuleList(
            FusionLayer(channels, grn, None if i else in_channels)
            for i in range(num_layers)
        )

    def forward(self, maps):
        """Return four fused maps, finest first, of four (b, c_i, h_i, w_i).

        Raises
        ------
        ValueError
            If a map is not twice as high and wide as the next.
        """
        sizes = [tuple(x.shape[-2:]) for x in maps]
        halves = [(2 * h, 2 * w) for h, w in sizes[1:]]
        if len(maps) != 4 or sizes[:-1] != halves:
            raise ValueError(
                f"maps of sizes {sizes}; expected four, each twice the next: choose an "
                "image size that is a multiple of the coarsest stride (mostly 32)"
            )
        for layer in self.layers:
            maps = layer(maps)
        return maps

    def load_published(self, state_dict: Mapping[str, torch.Tensor]):
        """Load the authors' weights: their names with or without ``neck.``.

        They were trained with ``grn="as_published"``; loading them into the other kind
        warns, since the outputs differ.

        Raises
        ------
        ValueError
            If names are unknown or missing, or shapes differ.
        """
        if not self.published:
            warnings.warn(
                'the published weights were trained with grn="as_published"; with '
                '"channel" the maps differ from the authors\'',
                stacklevel=2,
            )
        load_renamed(self, state_dict, "neck")
        return self
