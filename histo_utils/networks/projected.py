"""A network up to its vector, and what is put on that vector."""

import torch
import torch.nn.functional as F

POOLINGS = ("head", "mean", "mean_before_relu")


class Pooled(torch.nn.Module):
    """A timm network up to its vector.

    ``head``: what timm's own head hands to the classifier (the second fully connected
    layer for VGG, the pooled map for most others). ``mean``: of the last feature map.
    ``mean_before_relu``: of DenseNet's last batch norm without ReLU, as KimiaNet's
    features are made (timm's ``norm5`` holds the ReLU inside).
    """

    def __init__(self, network, pooling="head"):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(
                f"unknown pooling {pooling!r}; valid are {', '.join(POOLINGS)}"
            )
        features = getattr(network, "features", None)
        if pooling == "mean_before_relu" and not hasattr(features, "norm5"):
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
            x = self.network.features[:-1](x)
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
    """Vectors of ``body``, mapped linearly to ``dim`` numbers, of length 1."""

    def __init__(self, body, dim=128):
        super().__init__()
        self.body = body
        self.projection = torch.nn.Linear(body.dimension, dim)

    @property
    def dimension(self):
        """Length of a vector."""
        return self.projection.out_features

    def forward(self, x):
        """Return (b, dim) unit vectors, whose inner products are cosines."""
        return F.normalize(self.projection(self.body(x)), dim=1)


class Joined(torch.nn.Module):
    """M learners' unit vectors side by side; a cosine is the mean of theirs."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    @property
    def learners(self):
        """Number of learners, M."""
        return len(self.body.masks)

    def forward(self, x):
        """Return (b, M d) unit vectors of (b, 3, h, w) images."""
        return F.normalize(torch.cat(self.body(x), dim=1), dim=1)
