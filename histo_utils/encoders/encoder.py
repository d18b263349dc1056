"""What an encoder is: a network with all that must travel with it."""

import hashlib
from dataclasses import dataclass

import torch

from histo_utils.loaders import Preprocessing


@dataclass(frozen=True)
class Card:
    """What a reader must know of an encoder before believing its scores."""

    weights: str  # where they come from
    pooling: str  # how a feature map becomes a vector
    licence: str = "unknown"  # of the weights
    mpp: float | None = None  # µm/px trained at; None: natural images, or not known
    gated: bool | None = False  # need an account or an agreement; None: not known
    tcga: bool | None = None  # trained on TCGA slides; None: not known


@dataclass(frozen=True, eq=False)
class Encoder:
    """A network, its preprocessing and its card; any network can be one.

    Parameters
    ----------
    name : str
    network : torch.nn.Module
        (b, 3, h, w) float tensor in, (b, dimension) out.
    preprocessing : histo_utils.loaders.Preprocessing
    dimension : int
    card : Card
    recipe : dict, optional
        How to build the network again: ``{"network": <name in NETWORKS>, **options}``,
        as JSON can hold it. Needed by `save` alone.

    Examples
    --------
    An adapter for a network of one's own:

    >>> network = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten())
    >>> card = Card("none", "mean", licence="MIT", mpp=0.5, tcga=False)
    >>> mine = Encoder("mean colour", network, Preprocessing(size=32), 3, card)
    >>> mine.describe()["trained at, µm/px"]
    0.5
    """

    name: str
    network: torch.nn.Module
    preprocessing: Preprocessing
    dimension: int
    card: Card
    recipe: dict | None = None

    def describe(self):
        """Return one row of a table of encoders, as a dict."""
        size = self.preprocessing.size
        says = {True: "yes", False: "no", None: "unknown"}
        no_mpp = "not known" if self.card.tcga is None else "natural images"
        return {
            "encoder": self.name,
            "weights": self.card.weights,
            "input, px": "as it is" if size is None else size,
            "dimension": self.dimension,
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "pooling": self.card.pooling,
            "trained at, µm/px": self.card.mpp or no_mpp,
            "licence": self.card.licence,
            "gated": says[self.card.gated],
            "TCGA": says[self.card.tcga],
        }

    def fingerprint(self):
        """Hash of everything that decides its vectors."""
        digest = hashlib.sha256(str(self.network).encode())
        digest.update(repr((self.name, self.preprocessing, self.card)).encode())
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().tobytes())
        return digest.hexdigest()
