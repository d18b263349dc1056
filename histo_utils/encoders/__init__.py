"""Encoders: a network with all that must travel with it, and patches to vectors.

What a vector means depends on the weights, the input size, the scaling, the pooling
and the µm per pixel. `Encoder` holds them together.
"""

from histo_utils.encoders.embedding import cache_key, embed, identity, inputs
from histo_utils.encoders.encoder import Card, Encoder
from histo_utils.encoders.published import load_published
from histo_utils.encoders.registry import NETWORKS, build, frozen, fused, projected
from histo_utils.encoders.saved import load, save
from histo_utils.networks.projected import Pooled

__all__ = [
    "NETWORKS", "Card", "Encoder", "Pooled", "build", "cache_key", "embed", "frozen",
    "fused", "identity", "inputs", "load", "load_published", "projected", "save",
]  # fmt: skip
