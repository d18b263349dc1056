"""The fusion neck over four maps of a frozen network, and its heads (LGFFEM 2025).

The neck passes context down from coarse to fine and up again, a graph as in
EfficientDet. Each path weighs a map x by a mask z that it gives itself,
``(1 - a) · x · sigmoid(z) + a · x`` with one learned number a, 0 at the start: a local
path's mask sees one place only, a global path's a neighbourhood and, through its
response normalisation, the whole map. Each head pools one map by a generalised mean.

Nuñez-Fernández et al., LGFFEM, Sensors 2025; details as in camilo-nunez/ffnir. GRN: Woo
et al., ConvNeXt V2, CVPR 2023. GeM: Radenović et al., Fine-tuning CNN image retrieval
with no human annotation, TPAMI 2019.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

GRN_AXES = {"channel": 1, "as_published": -1}  # of (b, c, 1, 1) responses


class GRN(nn.Module):
    """Global response normalisation: γ · x · N + β + x.

    N is a channel's response (its Euclidean norm over the map) relative to the mean
    response of all channels.

    Parameters
    ----------
    channels : int
    mode : {"channel", "as_published"}
        The mean over channels; or, as released, over the last axis, which has one entry
        there, so that N is 1 within 4e-7 and nothing is normalised.
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


class ChannelNorm(LayerNorm2d):
    """Layer norm over channels; its name stands in saved encoders' fingerprints."""


class Projection(nn.Module):
    """Bring a backbone's map to the neck's channels, through half the input's."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)
        self.norm = ChannelNorm(in_channels // 2)
        self.expand = nn.Conv2d(in_channels // 2, channels, 1)

    def forward(self, x):
        """Return (b, channels, h, w) of (b, in_channels, h, w)."""
        return self.expand(F.gelu(self.norm(self.squeeze(x))))


class LocalAggregator(nn.Module):
    """Weigh a map by a mask from each place alone; optionally after doubling it."""

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
    """Weigh a map by a mask from its surroundings; optionally after halving it."""

    def __init__(self, channels: int, downsample: bool = False, grn: str = "channel"):
        super().__init__()
        self.resize = None
        if downsample:
            half = _depthwise(channels, stride=2)
            self.resize = nn.Sequential(half, ChannelNorm(channels))
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


class FusionNode(nn.Module):
    """Sum of maps, each through its own path, with weights w_i / (Σ w + 1e-4)."""

    # The learned w start at 1; as in the released code nothing keeps them positive.
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
    """One pass over the four scales: coarse to fine, then fine to coarse."""

    def __init__(self, channels: int, grn: str, in_channels=None):
        super().__init__()

        def near(**how):
            return LocalAggregator(channels, **how)

        def wide(**how):
            return GlobalAggregator(channels, grn=grn, **how)

        self.project = None
        if in_channels is not None:  # the first layer: of the backbone's maps
            self.project = nn.ModuleList(Projection(c, channels) for c in in_channels)
        self.inner3 = FusionNode(wide(), near(upsample=True))
        self.inner2 = FusionNode(wide(), near(upsample=True))
        self.out1 = FusionNode(wide(), near(upsample=True))
        self.out2 = FusionNode(near(), near(), wide(downsample=True))
        self.out3 = FusionNode(near(), near(), wide(downsample=True))
        self.out4 = FusionNode(near(), wide(downsample=True))

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
        return [out1, out2, out3, self.out4(p4, out3)]


class LocalGlobalFusionNeck(nn.Module):
    """Fuse a backbone's four maps, several layers deep (LGFFEM 2025).

    The paper's neck (512 channels, 3 layers) on ConvNeXt V2 base (128, 256, 512 and
    1024 channels) has 12,452,308 parameters. A map must be twice as wide as the next.

    Parameters
    ----------
    in_channels : sequence of four int
        Of the backbone's maps, finest first.
    channels : int
        Of all maps that come out.
    num_layers : int
    grn : {"channel", "as_published"}
        Response normalisation as meant, or as released, where it does nothing.

    """

    def __init__(self, in_channels, channels=512, num_layers=3, grn="channel"):
        super().__init__()
        if len(in_channels) != 4 or num_layers < 1:
            raise ValueError(
                f"{len(in_channels)} maps and {num_layers} layers; the neck takes four "
                "maps and one layer or more"
            )
        self.layers = nn.ModuleList(
            FusionLayer(channels, grn, None if i else in_channels)
            for i in range(num_layers)
        )

    def forward(self, maps):
        """Return four fused maps, finest first, of four (b, c_i, h_i, w_i)."""
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


class NoNeck(nn.ModuleList):
    """The neck without its graph: each map only brought to the neck's channels."""

    def __init__(self, in_channels, channels):
        super().__init__(Projection(c, channels) for c in in_channels)

    def forward(self, maps):
        """Return four maps (b, channels, h_i, w_i)."""
        return [project(x) for project, x in zip(self, maps, strict=True)]


class Means(nn.Module):
    """A head that takes the mean of every channel of every map."""

    def forward(self, maps):
        """Return (b, channels of all maps)."""
        return torch.cat([x.mean((2, 3)) for x in maps], 1)


class GeM(nn.Module):
    """Generalised-mean pooling, (mean of max(x, eps)^p)^(1/p) per channel.

    p = 1 is the mean of the clamped map, a large p nears the maximum. The clamp drops
    all negative activations.

    Parameters
    ----------
    p, eps : float
        Exponent at the start (it is learned); smallest activation.
    """

    def __init__(self, p: float = 4.6, eps: float = 1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([float(p)]))
        self.eps = eps

    def forward(self, x):
        """Return (b, c) of a map (b, c, h, w)."""
        return x.clamp(min=self.eps).pow(self.p).mean((2, 3)).pow(1 / self.p)


class ScaleHead(nn.Module):
    """Pool one map into its part of the embedding: GeM, BN, linear, unit, linear."""

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

    Per scale: GeM, batch norm, dropout, linear, unit length, linear; so scales differ
    in length, and a search by Euclidean distance mixes length and angle. 2,105,348
    parameters for 512 channels, which give 2048 dimensions.

    Parameters
    ----------
    channels : int
    p : float
        Of `GeM`, at the start.
    dropout : float
    """

    def __init__(self, channels, p=4.6, dropout=0.6):
        super().__init__()
        self.scales = nn.ModuleList(ScaleHead(channels, p, dropout) for _ in range(4))

    def forward(self, maps):
        """Return (b, 4 · channels) of four maps (b, channels, h_i, w_i)."""
        parts = zip(self.scales, maps, strict=True)
        return torch.cat([head(x) for head, x in parts], 1)


class Fusion(nn.Module):
    """Four maps of a frozen backbone, through neck and head to (b, 4 C) vectors."""

    # The backbone takes no gradient and stays in evaluation mode; the authors set all
    # to training mode, which differs where there is batch norm or drop path.
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


def _depthwise(channels, stride=1):
    how = {"padding": 1, "groups": channels, "bias": False}
    return nn.Conv2d(channels, channels, 3, stride, **how)
