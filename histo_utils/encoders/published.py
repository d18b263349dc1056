"""The checkpoints that two papers' authors released: KimiaNet and LGFFEM."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from histo_utils.encoders.checkpoints import fit_state, read_state, some, without_prefix
from histo_utils.encoders.encoder import Card, Encoder
from histo_utils.encoders.pretrained import frozen
from histo_utils.encoders.recipes import build
from histo_utils.loaders import Preprocessing

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_published(
    path, kind=None, *, backbone="convnextv2_base.fcmae", backbone_weights=None,
    device="cpu",
) -> Encoder:  # fmt: skip
    """Read a checkpoint that a paper's authors released, whichever it is.

    Parameters
    ----------
    path : path
        KimiaNet's ``KimiaNetPyTorchWeights.pth`` (Riasatian et al. 2021), or neck and
        head of LGFFEM (Nuñez-Fernández et al. 2025). Nothing in it is executed.
    kind : {"kimianet", "lgffem"}, optional
        Expected; without it the names in the file tell.
    backbone : str
        LGFFEM only: the frozen timm network below the neck.
    backbone_weights : path, optional
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
        missing, unexpected or mis-shaped parameters, or another backbone's neck.
    """
    state = read_state(path)
    found = published_kind(state)
    if kind not in (None, found):
        raise ValueError(
            f"{path} is a checkpoint of {found}, not {kind}; give kind={found!r} or "
            "another file"
        )
    if found == "kimianet":
        made = _kimianet(state, Path(path))
    else:
        made = _lgffem(state, Path(path), backbone, backbone_weights)
    made.network.requires_grad_(False).eval().to(device)
    return made


def published_kind(state) -> str:
    """Say whose checkpoint a state dict is, by its names.

    Returns
    -------
    "kimianet" or "lgffem"

    Raises
    ------
    ValueError
        Neither; what was found is named.
    """
    bare = _bare(state)
    if "model.0.conv0.weight" in bare:
        return "kimianet"
    if any(name.startswith("neck.neck_layer_0.") for name in bare):
        return "lgffem"
    raise ValueError(
        f"the names {some(list(state))} are of no published checkpoint known here; "
        "expected KimiaNet's (module.model.0.conv0.weight, …, module.fc_4.bias) or "
        "LGFFEM's (neck.neck_layer_0.…, head.h1.…). For another network make an "
        "Encoder and load its state dict with fit_state"
    )


def kimianet_state(state) -> tuple[dict[str, torch.Tensor], int]:
    """Rename KimiaNet's PyTorch checkpoint for timm's densenet121.

    The authors trained torchvision's DenseNet-121 under ``DataParallel``; its
    ``features`` have the same names in timm. Their last layer ``fc_4`` becomes timm's
    classifier.

    Returns
    -------
    state : dict
    n_classes : int
        Rows of the last layer (30 as published), 0 if the file has none.
    """
    bare = _bare(state)
    features = without_prefix(bare, "model.0.")
    renamed = {f"features.{name}": value for name, value in features.items()}
    head = without_prefix(bare, "fc_4.")
    renamed |= {f"classifier.{name}": value for name, value in head.items()}
    known = ("model.0.", "fc_4.")
    renamed |= {k: v for k, v in bare.items() if not k.startswith(known)}
    return renamed, len(head["weight"]) if "weight" in head else 0


def lgffem_parts(state) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """Split the checkpoint of LGFFEM's authors, and read its sizes off its shapes.

    Returns
    -------
    sizes : dict
        ``in_channels`` (4 numbers), ``channels``, ``num_layers``.
    parts : dict
        State dicts ``neck``, ``head`` and ``backbone``; the last is empty if the file
        has none.

    Raises
    ------
    ValueError
        A layer that tells the sizes is missing, or names of no part.
    """
    bare = _bare(state)
    parts = {
        part: without_prefix(bare, f"{part}.") for part in ("neck", "head", "backbone")
    }
    other = [name for name in bare if name.split(".")[0] not in parts]
    if other:
        raise ValueError(
            f"unexpected names {some(other)} in a checkpoint of LGFFEM; expected "
            "neck.…, head.… and, where it is saved with them, backbone.…"
        )
    down = [
        f"neck_layer_0.p{level}_down_channel.pwconv1.weight" for level in (1, 2, 3, 4)
    ]
    missing = [name for name in down if name not in parts["neck"]]
    if missing or "h1.fc.weight" not in parts["head"]:
        raise ValueError(
            f"no {some(missing) or 'head.h1.fc.weight'} in a checkpoint of LGFFEM, so "
            "its sizes are not known; get the whole file"
        )
    layers = {name.split(".")[0] for name in parts["neck"]}
    sizes = {
        "in_channels": [parts["neck"][name].shape[1] for name in down],
        "channels": len(parts["head"]["h1.fc.weight"]),
        "num_layers": sum(bool(re.fullmatch(r"neck_layer_\d+", x)) for x in layers),
    }
    return sizes, parts


def _bare(state):
    """Names without the prefix that ``DataParallel`` gives to all of them."""
    wrapped = all(name.startswith("module.") for name in state)
    return without_prefix(state, "module.") if wrapped else dict(state)


def _kimianet(state, path):
    renamed, n_classes = kimianet_state(state)
    recipe = {
        "network": "timm", "name": "densenet121", "pooling": "mean_before_relu",
        "num_classes": n_classes,
    }  # fmt: skip
    network = build(recipe)
    fit_state(network.network, renamed, str(path))
    card = Card(
        path.name, "mean_before_relu", "non-commercial research, no redistribution",
        mpp=0.5, gated=True, tcga=True,
    )  # fmt: skip
    # The authors' PyTorch code resizes nothing: 1000 px at 0.5 µm per pixel.
    how = Preprocessing(*IMAGENET, size=None)
    return Encoder("KimiaNet", network, how, network.dimension, card, recipe)


def _lgffem(state, path, backbone, backbone_weights):
    sizes, parts = lgffem_parts(state)
    expected = sizes.pop("in_channels")
    recipe = {"network": "fusion", "name": backbone, "grn": "as_published", **sizes}
    own = None
    if not parts["backbone"]:
        own = frozen(backbone, backbone_weights).network.network.state_dict()
    network = build(recipe, source=own)
    channels = network.backbone.feature_info.channels()
    if channels != expected:
        raise ValueError(
            f"{path} fuses maps of {expected} channels; {backbone} gives {channels}: "
            "give the backbone it was trained on (backbone=…)"
        )
    if parts["backbone"]:
        fit_state(network.backbone, parts["backbone"], f"{path}: backbone")
    network.neck.load_published(parts["neck"])
    network.head.load_published(parts["head"])
    card = Card(path.name, "4 maps fused, GeM each", "none stated by the authors")
    how = Preprocessing(*IMAGENET, size=224)
    return Encoder("LGFFEM", network, how, network.dimension, card, recipe)
