"""Fine-tuning the last part of a network: the cut, the new head, what both give.

Kieffer et al., IPTA 2017, train a new head on what a frozen network gives, attach it,
and train it further with block 5 of VGG16 or the last two blocks of Inception-v3.
"""

from __future__ import annotations

import torch
from torch import nn

from histo_utils.networks.stages import cut


def halves(network) -> tuple[nn.Module, nn.Module]:
    """Cut a timm network in front of the part that is fine-tuned.

    VGG16 is cut before block 5, Inception-v3 before its last two blocks, and a network
    of inverted residuals (the stand-in, MobileNetV2) behind stage 6 of 7, so that its
    last stage and the convolution before the pooling are trained. Both halves share
    their parts with ``network``.

    Returns
    -------
    front : torch.nn.Module
        (b, 3, h, w) -> a feature map.
    back : torch.nn.Module
        That map -> the bottleneck features (b, d): all of VGG16's last map (25,088 at
        224 px), the mean over places for the others (Inception-v3: 2,048).

    Raises
    ------
    ValueError
        Another network.
    """
    kind = type(network).__name__
    if hasattr(network, "conv_stem"):
        return cut(network, 6)
    if kind == "VGG" and len(network.features) == 31:
        return network.features[:24], nn.Sequential(network.features[24:], nn.Flatten())
    if kind == "InceptionV3":
        blocks = ("Conv", "Pool", "Mixed")  # the auxiliary head is left out
        parts = [m for name, m in network.named_children() if name.startswith(blocks)]
        mean = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*parts[:-2]), nn.Sequential(*parts[-2:], *mean)
    raise ValueError(
        f"{kind} has no known cut; expected timm's vgg16, inception_v3 or a network of "
        "inverted residuals such as mobilenetv2_100: cut others by hand"
    )


def new_head(features, width, classes, seed=0) -> nn.Sequential:
    """Dense, ReLU, dense: logits of classes; the softmax is in the loss.

    Parameters
    ----------
    features, width, classes : int
        Length of what comes in; of the layer between (Kieffer 2017: 256 for VGG16,
        1024 for Inception-v3); number of classes.
    seed : int
        Of the random weights; torch's own generator stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, classes)
        )


def outputs(network, inputs, batch_size=64) -> torch.Tensor:
    """Run a network on stored inputs, in batches and without gradients.

    Parameters
    ----------
    network : torch.nn.Module
        Used in the mode it is in.
    inputs : (n, …) tensor

    Returns
    -------
    (n, …) tensor, on the CPU
    """
    device = next((p.device for p in network.parameters()), inputs.device)
    with torch.no_grad():
        parts = [network(x.to(device)).cpu() for x in inputs.split(batch_size)]
    return torch.cat(parts)


def eight_views(images) -> list[torch.Tensor]:
    """All quarter turns of images (n, c, s, s), each as it is and mirrored.

    Examples
    --------
    >>> views = eight_views(torch.arange(4.0).reshape(1, 1, 2, 2))
    >>> len({tuple(view.flatten().tolist()) for view in views})
    8
    """
    both = images, images.flip(3)
    return [torch.rot90(x, k, (2, 3)) for k in range(4) for x in both]
