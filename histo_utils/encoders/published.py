"""The checkpoints that two papers' authors released: KimiaNet and LGFFEM."""

import re
from pathlib import Path

from histo_utils.encoders.checkpoints import fit_state, read_state, some
from histo_utils.encoders.encoder import Card, Encoder
from histo_utils.encoders.registry import build, frozen
from histo_utils.loaders import Preprocessing
from histo_utils.networks.published import published_name

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
        or parameters that do not fit.
    """
    path, state = Path(path), read_state(path)
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
    own = () if found == "kimianet" else (backbone, backbone_weights)
    made = {"kimianet": _kimianet, "lgffem": _lgffem}[found](state, path, *own)
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


def _lgffem(state, path, backbone, backbone_weights):
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
    layers = {name.split(".")[0] for name in neck}
    recipe = {
        "network": "fusion", "name": backbone, "grn": "as_published",
        "channels": len(head["h1.fc.weight"]),
        "num_layers": sum(bool(re.fullmatch(r"neck_layer_\d+", x)) for x in layers),
    }  # fmt: skip
    own = None
    if not below:
        own = frozen(backbone, backbone_weights).network.network.state_dict()
    network = build(recipe, source=own)
    channels = network.backbone.feature_info.channels()
    expected = [neck[name].shape[1] for name in down]
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
