"""Which parts of a network are trained, and where it is cut in two.

The papers fine-tune the last part or parts of a network. `train_only` says which by the
beginnings of parameter names; `cut` divides a network of inverted residuals so that the
frozen front needs to run only once.
"""

from __future__ import annotations

from itertools import accumulate

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
    """Let only parameters whose names begin so be trained; return how many they are.

    Parameters
    ----------
    network : torch.nn.Module
    beginnings : iterable of str
        ``("",)`` is the whole network.

    Raises
    ------
    ValueError
        A beginning that no parameter has; the parts of the network are named.

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


def cut(network, stage) -> tuple[nn.Module, nn.Module]:
    """Divide a timm network of inverted residuals in front of a stage.

    Both halves share their parts with ``network``: training the second trains it.

    Parameters
    ----------
    network : torch.nn.Module
        MobileNetV2, EfficientNet or the like from timm, with ``blocks``.
    stage : int
        The first of ``network.blocks`` that belongs to the second half; 0 puts only
        the stem into the first.

    Returns
    -------
    front : torch.nn.Module
        (b, 3, h, w) -> a feature map.
    back : torch.nn.Module
        That map -> pooled features (b, d), before the classifier.

    Raises
    ------
    ValueError
        A network without such blocks, or a stage it does not have.
    """
    blocks = getattr(network, "blocks", None)
    if blocks is None or not hasattr(network, "conv_stem"):
        raise ValueError(
            f"{type(network).__name__} is not built of a stem and blocks; expected one "
            "like timm's mobilenetv2_100: train others from images, with train_only"
        )
    if not 0 <= stage <= len(blocks):
        raise ValueError(f"stage={stage}; this network has stages 0 to {len(blocks)}")
    front = nn.Sequential(network.conv_stem, network.bn1, *blocks[:stage])
    head = (network.conv_head, network.bn2, network.global_pool)
    return front, nn.Sequential(*blocks[stage:], *head)
