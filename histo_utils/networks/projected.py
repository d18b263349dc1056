"""A pretrained network up to its vector, and a short projection of that vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F

POOLINGS = ("head", "mean", "mean_before_relu")


class Pooled(torch.nn.Module):
    """A timm network up to its vector.

    Parameters
    ----------
    network : torch.nn.Module
        From timm.
    pooling : {"head", "mean", "mean_before_relu"}
        ``head``: what timm's own head hands to the classifier (the second fully
        connected layer for VGG, the pooled map for most others). ``mean``: global
        average of the last feature map. ``mean_before_relu``: DenseNet's last
        batch norm without its ReLU, averaged, as KimiaNet's features are made; timm's
        ``norm5`` holds the ReLU inside, so its feature map is another one.

    Attributes
    ----------
    dimension : int
        Length of a vector.

    Raises
    ------
    ValueError
        An unknown pooling, or ``mean_before_relu`` for a network without ``norm5``.
    """

    def __init__(self, network, pooling="head"):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(
                f"unknown pooling {pooling!r}; valid are {', '.join(POOLINGS)}"
            )
        if pooling == "mean_before_relu" and not hasattr(
            getattr(network, "features", None), "norm5"
        ):
            raise ValueError(
                f"pooling='mean_before_relu' for a {type(network).__name__}; it is "
                "there for timm's DenseNets, whose last layer is features.norm5"
            )
        self.network, self.pooling = network, pooling

    @property
    def dimension(self):
        """Length of a vector."""
        if self.pooling != "head":
            return self.network.num_features
        return getattr(self.network, "head_hidden_size", self.network.num_features)

    def forward(self, x):
        """Return (b, dimension) vectors of (b, 3, h, w) images."""
        if self.pooling == "mean_before_relu":
            norm = self.network.features.norm5
            for layer in self.network.features[:-1]:
                x = layer(x)
            x = F.batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                training=False, eps=norm.eps,
            )  # fmt: skip
            return x.mean((2, 3))
        x = self.network.forward_features(x)
        if self.pooling == "mean":
            return x.mean((2, 3))
        return self.network.forward_head(x, pre_logits=True)


class Projected(torch.nn.Module):
    """Vectors of a network, mapped linearly to ``dim`` numbers, of length 1.

    What metric learning trains: a backbone with one linear layer, then the L2
    normalisation under which inner products are cosines.

    Parameters
    ----------
    body : torch.nn.Module
        (b, 3, h, w) in, (b, body.dimension) out; a `Pooled`.
    dim : int
        Length of a projected vector.

    Examples
    --------
    >>> body = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    >>> body.dimension = 3
    >>> vectors = Projected(body, dim=2)(torch.rand(4, 3, 8, 8))
    >>> tuple(vectors.shape), bool(torch.allclose(vectors.norm(dim=1), torch.ones(4)))
    ((4, 2), True)
    """

    def __init__(self, body, dim=128):
        super().__init__()
        self.body = body
        self.projection = torch.nn.Linear(body.dimension, dim)

    @property
    def dimension(self):
        """Length of a vector."""
        return self.projection.out_features

    def forward(self, x):
        """Return (b, dim) unit vectors of (b, 3, h, w) images."""
        return F.normalize(self.projection(self.body(x)), dim=1)


class Joined(torch.nn.Module):
    """One vector of several learners': the unit vectors side by side, normalised.

    With M learners the cosine of two joined vectors is the mean of the learners' M
    cosines, so no learner weighs more than another.

    Parameters
    ----------
    body : torch.nn.Module
        (b, 3, h, w) in, a list of (b, d) unit vectors out.
    """

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        """Return (b, M d) unit vectors of (b, 3, h, w) images."""
        return F.normalize(torch.cat(self.body(x), dim=1), dim=1)
