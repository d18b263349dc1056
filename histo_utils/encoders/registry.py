"""Encoders of pretrained networks, and the networks that can be built by name."""

import difflib
import os
from dataclasses import replace
from pathlib import Path

import timm
import torch

from histo_utils import networks
from histo_utils.encoders.checkpoints import fit_state, local_weights, read_state
from histo_utils.encoders.encoder import Card, Encoder
from histo_utils.loaders import INTERPOLATIONS, Preprocessing
from histo_utils.networks import Joined, Pooled, Projected

# The book's common network: an 8-bit release with the batch norm folded in, padded as
# TensorFlow pads. timm's own weights of that name are others.
_MOBILENET = "mobilenetv2_100"


def frozen(
    name, weights=None, *, pooling="head", size=None, seed=None, device="cpu",
    options=None,
) -> Encoder:  # fmt: skip
    """Build an encoder from timm, in evaluation mode, its parameters frozen.

    Weights are those of ``seed`` (random), of ``weights``, of a file
    ``$HISTO_WEIGHTS/<name>[.<tag>].safetensors``, or timm's from the Hugging Face hub.

    Parameters
    ----------
    name : str
        As timm knows it (``vgg16.tv_in1k``, …), or anybody's timm model,
        ``hf-hub:<owner>/<model>`` or ``local-dir:<folder>``, whose card then says that
        it is not known what it was trained on.
    weights : path, optional
        A ``.safetensors`` or PyTorch state dict; loaded strictly.
    pooling : {"head", "mean", "mean_before_relu"}
        See `Pooled`.
    size : int, optional
        Input side in pixels; default that of the weights.
    seed : int, optional
        Random weights, for tests and as a baseline.
    device : str
    options : dict, optional
        Further arguments of ``timm.create_model`` that the model's page asks for.

    Raises
    ------
    ValueError
        A name that timm does not know (the nearest are named), weights and seed both,
        or weights of another network.
    FileNotFoundError
        Weights neither here nor on the hub; the message says what to do.

    Notes
    -----
    ``mobilenetv2_100`` without a tag, from a file or a seed, is the book's common
    network: ``pad_type="same"``, RGB/127.5 - 1, 224 px, bilinear; else it is timm's.
    """
    if weights is not None and seed is not None:
        raise ValueError(f"weights={weights} and seed={seed} were given; expected one")
    foreign = ":" in name  # somebody's model, not one of timm's own list
    if not foreign:
        _check_name(name)
    path = weights or (local_weights(name) if seed is None else None)
    ours = name == _MOBILENET and (seed is not None or path is not None)
    options = ({"pad_type": "same"} if ours else {}) | (options or {})
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = timm.create_model(name, **options)
        source, licence = f"random, seed {seed}", "none"
    elif path is not None:
        network = timm.create_model(name, **options)
        fit_state(network, read_state(path), str(path))
        source = Path(path).name
        licence = "Apache-2.0" if ours else network.pretrained_cfg.get("license")
    else:
        network = _from_hub(name, options)
        source = name if foreign else network.pretrained_cfg.get("hf_hub_id") or name
        licence = network.pretrained_cfg.get("license")
    pooled = Pooled(network, pooling).requires_grad_(False).eval().to(device)
    known = None if foreign else False
    card = Card(source, pooling, licence or "unknown", None, gated=known, tcga=known)
    recipe = {"network": "timm", "name": name, "pooling": pooling, **options}
    recipe = None if foreign else recipe  # its layers stand in somebody's file
    if ours:
        how = Preprocessing((0.5,) * 3, (0.5,) * 3, size or 224, "bilinear")
    else:
        cfg = network.pretrained_cfg
        way = cfg.get("interpolation")
        way = way if way in INTERPOLATIONS else "bilinear"
        size = size or cfg["input_size"][-1]
        how = Preprocessing(tuple(cfg["mean"]), tuple(cfg["std"]), size, way)
    return Encoder(name, pooled, how, pooled.dimension, card, recipe)


def projected(encoder, dim=128, seed=0) -> Encoder:
    """Put a linear layer and L2 normalisation on a `frozen` encoder, to be trained."""
    # the encoder's network is shared, not copied, and gets its gradients back
    recipe = {**_timm_recipe(encoder), "network": "projected", "dim": dim}
    network = build(recipe, seed)
    network.body = encoder.network.requires_grad_(True)
    name = f"{encoder.name}, projected to {dim}"
    card = replace(encoder.card, pooling=f"{encoder.card.pooling}, linear, unit length")
    return Encoder(name, network, encoder.preprocessing, dim, card, recipe)


def fused(encoder, seed=0, **options) -> Encoder:
    """Put LGFFEM's neck and heads on the maps of a `frozen` encoder, to be trained."""
    # options: those of _fusion; the encoder's weights are copied into the backbone
    recipe = {**_timm_recipe(encoder), "network": "fusion", **options}
    recipe.pop("pooling")
    network = build(recipe, seed, source=encoder.network.network.state_dict())
    card = replace(encoder.card, pooling="4 maps fused, GeM each")
    name, dimension = f"{encoder.name}, fused", network.dimension
    return Encoder(name, network, encoder.preprocessing, dimension, card, recipe)


def build(recipe, seed=0, **more) -> torch.nn.Module:
    """Build a recipe's network, ``{"network": <name in NETWORKS>, **options}``; random.

    >>> build({"network": "projected", "name": "resnet10t", "dim": 8}).dimension
    8
    """
    options = dict(recipe)
    name = options.pop("network", None)
    if name not in NETWORKS:
        near = difflib.get_close_matches(str(name), NETWORKS, 1, 0) or ["none"]
        known = f"nearest: {near[0]}; known are {', '.join(NETWORKS)}"
        raise ValueError(f"recipe of an unknown network {name!r}; {known}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return NETWORKS[name](**options, **more)
        except (TypeError, RuntimeError) as error:  # timm: RuntimeError, unknown name
            raise ValueError(
                f"the recipe {recipe} cannot be built: {error}; expected options of "
                f"encoders.NETWORKS[{name!r}]"
            ) from error


def _timm(name, pooling="head", **options):
    return Pooled(timm.create_model(name, **options), pooling)


def _projected(name, pooling="head", dim=128, **options):
    return Projected(_timm(name, pooling, **options), dim)


def _fusion(
    name, out_indices=(0, 1, 2, 3), channels=512, num_layers=3, grn="channel", p=4.6,
    dropout=0.6, source=None, in_channels=None, **options,
):  # fmt: skip
    """LGFFEM; ``source``: state dict of the whole timm network, for the backbone.

    With ``in_channels`` in place of a name the network takes the four maps.
    """
    if source is not None:
        overlay = {"state_dict": source}
        options = options | {"pretrained": True, "pretrained_cfg_overlay": overlay}
    if name is None:
        backbone, found = torch.nn.Identity(), in_channels
    else:
        backbone = timm.create_model(
            name, features_only=True, out_indices=tuple(out_indices), **options
        )
        found = backbone.feature_info.channels()
    if len(found) != 4:
        given = f"{name} gives {len(found)} maps for out_indices={out_indices}"
        raise ValueError(f"{given}; the neck fuses 4")
    neck = networks.LocalGlobalFusionNeck(found, channels, num_layers, grn)
    head = networks.MultiScaleGeMHead(channels, p, dropout)
    return networks.Fusion(backbone, neck, head, channels)


NETWORKS = {
    "timm": _timm,
    "projected": _projected,
    "mixed_attention_se_resnet50": networks.MixedAttentionSEResNet50,
    "branched_attention_resnet50": lambda **how: Joined(
        networks.BranchedAttentionResNet50(**how)
    ),
    "abe_m": lambda **how: Joined(networks.ABEM(**how)),
    "fusion": _fusion,
    "cbr": networks.CBRNet,
}


def _timm_recipe(encoder):
    if encoder.recipe is None or encoder.recipe.get("network") != "timm":
        what = "is not a plain timm network; give an encoder of frozen()"
        raise ValueError(f"{encoder.name} {what}")
    return encoder.recipe


def _check_name(name):
    stem = name.split(".")[0]
    if not timm.is_model(stem):
        near = ", ".join(difflib.get_close_matches(stem, timm.list_models(), 3, 0.5))
        raise ValueError(f"timm has no network {stem!r}; nearest: {near or 'none'}")
    tags = timm.list_pretrained(f"{stem}.*")
    if "." in name and name not in tags:
        known = ", ".join(tags) or "none"
        raise ValueError(f"timm has no weights {name!r}; it has {known}")


def _from_hub(name, options):
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # no network, no such weights, no room: many types
        if ":" in name:
            raise FileNotFoundError(
                f"{name} gave nothing ({type(error).__name__}: {error}). It needs a "
                "network, the right name and, for gated models, their terms accepted "
                "on the page and a token in HF_TOKEN; some need options=…"
            ) from error
        hub = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None) or name
        folder = os.environ.get("HISTO_WEIGHTS") or "HISTO_WEIGHTS, which is not set,"
        raise FileNotFoundError(
            f"{name}: {folder} has no {name}.safetensors, and the hub gave nothing "
            f"({type(error).__name__}). Download https://huggingface.co/{hub}/resolve/"
            "main/model.safetensors, save it under this name and name its folder in "
            "HISTO_WEIGHTS; or pass weights=<file>, or seed=0 for random weights"
        ) from error
