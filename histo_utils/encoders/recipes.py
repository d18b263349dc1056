"""Recipes: what a network is built from again, as plain data.

A recipe is a dict that JSON can hold: ``{"network": <name in NETWORKS>, …options}``.
`build` gives the network with random weights; an encoder's saved weights fill it.
"""

from __future__ import annotations

import difflib

import timm
import torch

from histo_utils.networks import (
    ABEM,
    BranchedAttentionResNet50,
    CBRNet,
    LocalGlobalFusionNeck,
    MixedAttentionSEResNet50,
    MultiScaleGeMHead,
)
from histo_utils.networks.fused import Fusion
from histo_utils.networks.projected import Joined, Pooled, Projected


def timm_network(name, pooling="head", **options):
    """Build a timm network up to its vector; options are ``timm.create_model``'s."""
    return Pooled(timm.create_model(name, **options), pooling)


def projected(name, pooling="head", dim=128, **options):
    """Build a timm network, a linear layer to ``dim`` numbers, L2 normalisation."""
    return Projected(timm_network(name, pooling, **options), dim)


def mixed_attention(**options):
    """Build Yang 2019's SE-ResNet50 with mixed attention."""
    return MixedAttentionSEResNet50(**options)


def branched_attention(**options):
    """Build the 4-branch attention ResNet-50; branches joined and normalised."""
    return Joined(BranchedAttentionResNet50(**options))


def abe(**options):
    """Build ABE-M; its learners joined and normalised."""
    return Joined(ABEM(**options))


def fusion(
    name, out_indices=(0, 1, 2, 3), channels=512, num_layers=3, grn="channel", p=4.6,
    dropout=0.6, normalise=False, source=None, **options,
):  # fmt: skip
    """Build LGFFEM: a frozen timm backbone, the fusion neck, four GeM heads.

    Parameters
    ----------
    name : str
        Of a timm network that can give feature maps.
    out_indices : 4 int
        Which maps, fine to coarse.
    channels, num_layers, grn
        Of the neck.
    p, dropout, normalise
        Of the heads.
    source : dict, optional
        State dict of the whole timm network, for the backbone; random without. Never
        part of a saved recipe.
    **options
        Of ``timm.create_model``.
    """
    if source is not None:
        overlay = {"state_dict": source}
        options = options | {"pretrained": True, "pretrained_cfg_overlay": overlay}
    backbone = timm.create_model(
        name, features_only=True, out_indices=tuple(out_indices), **options
    )
    found = backbone.feature_info.channels()
    if len(found) != 4:
        raise ValueError(
            f"{name} gives {len(found)} maps for out_indices={out_indices}; the neck "
            "fuses 4"
        )
    neck = LocalGlobalFusionNeck(found, channels, num_layers, grn)
    head = MultiScaleGeMHead(channels, p, dropout, normalise)
    return Fusion(backbone, neck, head, channels)


def cbr(**options):
    """Build a CBR network (convolution, batch norm, ReLU)."""
    return CBRNet(**options)


NETWORKS = {
    "timm": timm_network,
    "projected": projected,
    "mixed_attention_se_resnet50": mixed_attention,
    "branched_attention_resnet50": branched_attention,
    "abe_m": abe,
    "fusion": fusion,
    "cbr": cbr,
}


def build(recipe, seed=0, **more) -> torch.nn.Module:
    """Build the network of a recipe, with random weights.

    Parameters
    ----------
    recipe : dict
        ``network``: a name in ``NETWORKS``; the rest are its options.
    seed : int
        Of the random weights; torch's own generator stays as it was.
    **more
        Options that are not data (`fusion`'s ``source``).

    Raises
    ------
    ValueError
        An unknown network (the nearest is named), or options it does not take.

    Examples
    --------
    >>> network = build({"network": "projected", "name": "resnet10t", "dim": 8})
    >>> network.dimension
    8
    """
    options = dict(recipe)
    name = options.pop("network", None)
    if name not in NETWORKS:
        near = difflib.get_close_matches(str(name), NETWORKS, 1, 0) or ["none"]
        raise ValueError(
            f"recipe of an unknown network {name!r}; nearest: {near[0]}; known are "
            f"{', '.join(NETWORKS)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return NETWORKS[name](**options, **more)
        except (TypeError, RuntimeError) as error:  # timm: RuntimeError, unknown name
            raise ValueError(
                f"the recipe {recipe} cannot be built: {error}; expected options of "
                f"encoders.NETWORKS[{name!r}]"
            ) from error
