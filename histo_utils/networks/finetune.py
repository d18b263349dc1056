"""Fine-tuning: which parts are trained, where a network is cut, the new head."""

from __future__ import annotations

import hashlib
from itertools import accumulate

import torch
from torch import nn


def _growing(*parts):
    """Return configurations: the last part (I), two (II), three (III), all (IV)."""
    sums = accumulate(parts, lambda more, part: part + more)
    return dict(zip(("I", "II", "III"), sums, strict=True)) | {"IV": ("",)}


# Beginnings of the names (timm) of the parts that each paper re-trains; the new head,
# which every configuration trains, is not listed. KimiaNet's I to IV count dense blocks
# (with the transition behind a block). For the stand-in they count stages, taken where
# the resolution halves.
PARTS = {
    "vgg16": {"block 5": ("features.24.", "features.26.", "features.28.")},
    "inception_v3": {"last two blocks": ("Mixed_7b.", "Mixed_7c.")},
    "densenet121": _growing(
        ("features.denseblock4.", "features.norm5."),
        ("features.denseblock3.", "features.transition3."),
        ("features.denseblock2.", "features.transition2."),
    ),
    "mobilenetv2_100": _growing(
        ("blocks.6.", "conv_head."), ("blocks.5.",), ("blocks.3.", "blocks.4.")
    ),
}


def train_only(network, beginnings) -> int:
    """Train only parameters whose names begin so; return how many they are.

    ``("",)`` is the whole network.

    Examples
    --------
    >>> network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> train_only(network, ["1."])
    10
    """
    beginnings = tuple(beginnings)
    names = [name for name, _ in network.named_parameters()]
    for start in beginnings:
        if not any(name.startswith(start) for name in names):
            raise ValueError(
                f"no parameter's name begins with {start!r}; this network's parts are "
                f"{', '.join(dict.fromkeys(name.split('.')[0] for name in names))}"
            )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(beginnings))
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def cut(network, stage=None) -> tuple[nn.Module | None, nn.Module]:
    """Cut a timm network in front of the part that is trained.

    Both halves share their parts with ``network``: training the second trains it.

    Parameters
    ----------
    network : torch.nn.Module
        From timm, or in a `Pooled`.
    stage : int, optional
        Of a network of inverted residuals (MobileNetV2, EfficientNet), the first of its
        ``blocks`` that is trained; -1: the whole network, without a front. Default: the
        cut of Kieffer et al., IPTA 2017: VGG16 before block 5, Inception-v3 before its
        last two blocks; inverted residuals before block 6 of 0–6, so that their last
        stage and the convolution before the pooling are trained.

    Returns
    -------
    front : torch.nn.Module or None
        (b, 3, h, w) -> a feature map.
    back : torch.nn.Module
        That map -> the features before the classifier (b, d): all of VGG16's last map
        (25,088 at 224 px), the mean over places for the others.

    Raises
    ------
    ValueError
        Another network, or a stage it does not have.
    """
    if stage == -1:
        return None, network
    network = getattr(network, "network", network)
    kind = type(network).__name__
    if stage is None and kind == "VGG" and len(network.features) == 31:
        return network.features[:24], nn.Sequential(network.features[24:], nn.Flatten())
    if stage is None and kind == "InceptionV3":
        blocks = ("Conv", "Pool", "Mixed")  # the auxiliary head is left out
        parts = [m for name, m in network.named_children() if name.startswith(blocks)]
        mean = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*parts[:-2]), nn.Sequential(*parts[-2:], *mean)
    blocks = getattr(network, "blocks", None)
    if blocks is None or not hasattr(network, "conv_stem"):
        raise ValueError(
            f"{kind} has no known cut; expected timm's vgg16, inception_v3 or a "
            "network of a stem and blocks such as mobilenetv2_100: train others from "
            "images (stage=-1), with train_only"
        )
    stage = 6 if stage is None else stage
    if not 0 <= stage <= len(blocks):
        raise ValueError(f"stage={stage}; this network has stages 0 to {len(blocks)}")
    front = nn.Sequential(network.conv_stem, network.bn1, *blocks[:stage])
    head = (network.conv_head, network.bn2, network.global_pool)
    return front, nn.Sequential(*blocks[stage:], *head)


def new_head(features, width, classes, dropout=0.0, seed=0) -> nn.Sequential:
    """Dense, ReLU, (dropout,) dense: logits of classes; the softmax is in the loss.

    ``width``: of the layer between (Kieffer 2017: 256 for VGG16, 1024 for
    Inception-v3). Random weights follow from ``seed``; torch's own generator stays as
    it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Linear(features, width), nn.Linear(width, classes)
    between = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(first, nn.ReLU(), *between, last)


def digest(state) -> str:
    """Hash of the tensors of a state dict, or of a module; names included."""
    found = hashlib.sha256()
    state = state.state_dict() if isinstance(state, nn.Module) else state
    for name, tensor in state.items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
