"""The checkpoints that two papers' authors released: KimiaNet and LGFFEM."""

import os
import re
from pathlib import Path

from histo_utils.encoders.checkpoints import (
    fit_state,
    read_checkpoint,
    some,
    unwrapped,
)
from histo_utils.encoders.encoder import Card, Encoder
from histo_utils.encoders.registry import build, frozen
from histo_utils.loaders import Preprocessing
from histo_utils.networks.published import published_name

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Backbones of LGFFEM's configuration files: timm name, channels of the maps 0 to 3.
LGFFEM_BACKBONES = {
    "convnext_tiny": [96, 192, 384, 768],
    "convnext_base": [128, 256, 512, 1024],
    "convnextv2_tiny.fcmae": [96, 192, 384, 768],
    "convnextv2_base.fcmae": [128, 256, 512, 1024],  # of the published numbers
    "caformer_s18.sail_in22k_ft_in1k_384": [64, 128, 320, 512],
    "caformer_b36.sail_in22k_ft_in1k_384": [128, 256, 512, 768],
    "regnety_080_tv.tv2_in1k": [32, 224, 448, 896],
    "regnety_320.tv2_in1k": [32, 232, 696, 1392],
    "coatnet_1_rw_224.sw_in1k": [64, 96, 192, 384],
    "coatnet_3_rw_224.sw_in12k": [192, 192, 384, 768],
}


def load_published(
    path, kind=None, *, backbone=None, backbone_weights=None, seed=None,
    device="cpu",
) -> Encoder:  # fmt: skip
    """Read a checkpoint that a paper's authors released, whichever it is.

    Parameters
    ----------
    path : path
        KimiaNet's ``KimiaNetPyTorchWeights.pth`` (Riasatian et al. 2021), or neck and
        head of LGFFEM (Nuñez-Fernández et al. 2025), as its training scripts save them
        or as one state dict; here or in HISTO_WEIGHTS. Nothing in it is executed.
    kind : {"kimianet", "lgffem"}, optional
        Expected; without it the names in the file tell.
    backbone : str, optional
        LGFFEM only: the frozen timm network below the neck; default: of
        `LGFFEM_BACKBONES`, the one that the checkpoint, its file name or the channels
        of its maps name. ``"maps"``: none, the network takes the four maps.
    backbone_weights, seed : path, int, optional
        LGFFEM only: see `frozen`; not used if the file holds the backbone.
    device : str

    Returns
    -------
    Encoder
        For KimiaNet, ``encoder.network.network.classifier`` maps its 1024-d vectors to
        the 30 tumour types. For LGFFEM the GRN is the inactive one as published.

    Raises
    ------
    FileNotFoundError
        No such file, or no weights for the backbone.
    ValueError
        A file that cannot be read safely, another kind than expected or no known one,
        or parameters that do not fit.
    """
    path = Path(path)
    if not path.is_file() and os.environ.get("HISTO_WEIGHTS"):
        path = Path(os.environ["HISTO_WEIGHTS"]) / path
    given = read_checkpoint(path)
    parts = {part: _released(given, part) for part in ("neck", "head")}
    if all(parts.values()):  # as LGFFEM's training scripts save it
        whole = [(f"{p}.{k}", v) for p, state in parts.items() for k, v in state]
        given, config = dict(whole), str(given.get("fn_cfg_model_backbone", ""))
    else:
        config = ""
    state = unwrapped(given, path)
    if all(name.startswith("module.") for name in state):  # of DataParallel
        state = _below(state, "module.")
    if "model.0.conv0.weight" in state:
        found = "kimianet"
    elif any(name.startswith("neck.neck_layer_0.") for name in state):
        found = "lgffem"
    else:
        raise ValueError(
            f"the names {some(state)} are of no published checkpoint known here; "
            "expected KimiaNet's (module.model.0.conv0.weight, …) or LGFFEM's "
            "(neck.neck_layer_0.…, head.h1.…). Make an Encoder of another network"
        )
    if kind not in (None, found):
        say = f"is a checkpoint of {found}, not {kind}"
        raise ValueError(f"{path} {say}; give kind={found!r} or another file")
    if found == "kimianet":
        made = _kimianet(state, path)
    else:
        how = {"weights": backbone_weights, "seed": seed}
        made = _lgffem(state, path, backbone, config, how)
    made.network.requires_grad_(False).eval().to(device)
    return made


def _kimianet(state, path):
    """Torchvision's DenseNet-121 has timm's names; ``fc_4`` is the classifier."""
    head, features = _below(state, "fc_4."), _below(state, "model.0.")
    other = {k: v for k, v in state.items() if not k.startswith(("fc_4.", "model.0."))}
    renamed = {f"features.{name}": value for name, value in features.items()} | other
    renamed |= {f"classifier.{name}": value for name, value in head.items()}
    recipe = {
        "network": "timm", "name": "densenet121", "pooling": "mean_before_relu",
        "num_classes": len(head.get("weight", ())),
    }  # fmt: skip
    network = build(recipe)
    fit_state(network.network, renamed, str(path))
    licence = "non-commercial research, no redistribution"
    card = Card(path.name, "mean_before_relu", licence, 0.5, gated=True, tcga=True)
    # The authors' PyTorch code resizes nothing: 1000 px at 0.5 µm per pixel.
    how = Preprocessing(*IMAGENET, size=None)
    return Encoder("KimiaNet", network, how, network.dimension, card, recipe)


def _released(found, part):
    """Names and tensors of a part of LGFFEM's checkpoint, without `module.`."""
    inside = found.get(f"model_{part}_state_dict") if isinstance(found, dict) else None
    return [(k.removeprefix("module."), v) for k, v in (inside or {}).items()]


def _named_backbone(config, path, channels):
    """Name the backbone by configuration, file name, or the channels of its maps."""
    like = [name for name, own in LGFFEM_BACKBONES.items() if own == channels]
    for text in (config, path.name):
        text = re.sub(r"\W|_", "", text.lower())
        named = [n for n in like if re.sub(r"\W|_", "", n.split(".")[0]) in text]
        like = named or like
    if len(like) != 1:
        raise ValueError(
            f"{path} fuses maps of {channels} channels and names no backbone, which "
            f"may be {' or '.join(like) or 'none of the published'}; give backbone=…"
        )
    return like[0]


def _lgffem(state, path, backbone, config, how):
    neck, head, below = (_below(state, f"{p}.") for p in ("neck", "head", "backbone"))
    other = [k for k in state if k.split(".")[0] not in ("neck", "head", "backbone")]
    if other:
        raise ValueError(
            f"unexpected names {some(other)} in a checkpoint of LGFFEM; expected "
            "neck.…, head.… and perhaps backbone.…"
        )
    down = [f"neck_layer_0.p{i}_down_channel.pwconv1.weight" for i in (1, 2, 3, 4)]
    missing = [name for name in down if name not in neck]
    if missing or "h1.fc.weight" not in head:
        raise ValueError(
            f"no {some(missing) or 'head.h1.fc.weight'} in a checkpoint of LGFFEM, so "
            "its sizes are not known; get the whole file"
        )
    expected = [neck[name].shape[1] for name in down]
    backbone = backbone or _named_backbone(config, path, expected)
    layers = {name.split(".")[0] for name in neck}
    recipe = {
        "network": "fusion", "name": backbone, "grn": "as_published",
        "channels": len(head["h1.fc.weight"]),
        "num_layers": sum(bool(re.fullmatch(r"neck_layer_\d+", x)) for x in layers),
    }  # fmt: skip
    if backbone == "maps":
        recipe |= {"name": None, "in_channels": expected}
    own = None
    if not below and backbone != "maps":
        own = frozen(backbone, **how).network.network.state_dict()
    network = build(recipe, source=own)
    channels = expected
    if backbone != "maps":
        channels = network.backbone.feature_info.channels()
    if channels != expected:
        raise ValueError(
            f"{path} fuses maps of {expected} channels; {backbone} gives {channels}: "
            "give the backbone it was trained on (backbone=…)"
        )
    if below:
        fit_state(network.backbone, below, f"{path}: backbone")
    fit_state(network.neck, neck, f"{path}: neck", published_name)
    fit_state(network.head, head, f"{path}: head", published_name)
    card = Card(path.name, "4 maps fused, GeM each", "none stated by the authors")
    how = Preprocessing(*IMAGENET, size=224)
    return Encoder("LGFFEM", network, how, network.dimension, card, recipe)


def _below(state, prefix):
    """Entries whose names start with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
