"""The LGFFEM authors' parameter names, and how they lead to ours.

Their neck numbers its scales p1 … p4 and the steps of a layer 0 (input), 1 (inner) and
2 (output): ``p31_lca_p40`` is the local aggregator that brings p4's input to p3's inner
node. Each of their nodes lists its paths in the order of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

# our node: their weight, their paths
NODES = {
    "inner3": ("p3_1_weight", "p31_gca_p30", "p31_lca_p40"),
    "inner2": ("p2_1_weight", "p21_gca_p20", "p21_lca_p31"),
    "out1": ("p1_2_weight", "p12_gca_p10", "p12_lca_p21"),
    "out2": ("p2_2_weight", "p22_lca_p20", "p22_lca_P21", "p22_gca_p12"),
    "out3": ("p3_2_weight", "p32_lca_p30", "p32_lca_P31", "p32_gca_p22"),
    "out4": ("p4_2_weight", "p42_lca_p40", "p42_gca_p32"),
}
PARTS = {
    "keep": "alpha",
    "squeeze": "pwconv1",
    "expand": "pwconv2",
    "depthwise": "dwconv",
    "grn": "gc",
}
LOCAL_RESIZE = {"0": "normup", "1": "upsample"}
GLOBAL_RESIZE = {"0": "downsample", "1": "normup"}
HEAD_PARTS = {"pool": "gem", "norm": "bn", "embed": "fc", "rescale": "fc_norm"}


def published_name(name: str) -> str:
    """Return the authors' name of one of our parameters of the neck or the head.

    Examples
    --------
    >>> published_name("layers.0.inner3.paths.1.keep")
    'neck_layer_0.p31_lca_p40.alpha'
    >>> published_name("scales.3.rescale.bias")
    'h4.fc_norm.bias'
    """
    top, number, *rest = name.split(".")
    if top == "scales":
        return ".".join([f"h{int(number) + 1}", HEAD_PARTS[rest[0]], *rest[1:]])
    layer = f"neck_layer_{number}"
    if rest[0] == "project":
        scale = int(rest[1]) + 1
        part = PARTS.get(rest[2], rest[2])
        return ".".join([layer, f"p{scale}_down_channel", part, *rest[3:]])
    weight, *paths = NODES[rest[0]]
    if rest[1] == "weights":
        return f"{layer}.{weight}"
    path, part, tail = paths[int(rest[2])], rest[3], rest[4:]
    if part == "resize":
        resize = LOCAL_RESIZE if "_lca_" in path else GLOBAL_RESIZE
        part, tail = resize[tail[0]], tail[1:]
    return ".".join([layer, path, PARTS.get(part, part), *tail])


def load_renamed(
    module: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str
) -> None:
    """Load a state dict with the authors' names into a neck or a head.

    Parameters
    ----------
    module : torch.nn.Module
    state_dict : mapping
        The module's own part with or without the prefix, or a whole checkpoint, of
        which only the part with the prefix is read.
    prefix : {"neck", "head"}

    Raises
    ------
    ValueError
        If names are unknown or missing, or shapes differ; nothing is loaded then.
    """
    own = {k: v for k, v in state_dict.items() if k.startswith(f"{prefix}.")}
    given = {k.removeprefix(f"{prefix}."): v for k, v in (own or state_dict).items()}
    state = module.state_dict()
    ours = {published_name(name): name for name in state}
    wrong = [
        f"{theirs} is {tuple(given[theirs].shape)}, expected {tuple(state[name].shape)}"
        for theirs, name in ours.items()
        if theirs in given and given[theirs].shape != state[name].shape
    ]
    found = {
        "unknown": sorted(given.keys() - ours.keys()),
        "missing": sorted(ours.keys() - given.keys()),
        "of another shape": wrong,
    }
    problems = [
        f"{len(names)} {kind}: {', '.join(names)}"
        for kind, names in found.items()
        if names
    ]
    if problems:
        raise ValueError(
            f"the state dict does not fit this {prefix}: {'; '.join(problems)}. Build "
            "it with the checkpoint's in_channels, channels and num_layers"
        )
    module.load_state_dict({ours[name]: value for name, value in given.items()})
