"""The LGFFEM authors' parameter names, and how they lead to ours.

Their neck numbers its scales p1 … p4 and the steps of a layer 0 (input), 1 (inner) and
2 (output): ``p31_lca_p40`` is the local aggregator that brings p4's input to p3's inner
node. Each of their nodes lists its paths in the order of its weights.
"""

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
    "keep": "alpha", "squeeze": "pwconv1", "expand": "pwconv2", "depthwise": "dwconv",
    "grn": "gc",
}  # fmt: skip
LOCAL_RESIZE = {"0": "normup", "1": "upsample"}
GLOBAL_RESIZE = {"0": "downsample", "1": "normup"}
HEAD_PARTS = {"pool": "gem", "norm": "bn", "embed": "fc", "rescale": "fc_norm"}


def published_name(name: str) -> str:
    """Return the authors' name of one of our parameters of the neck or the head.

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
        down = f"p{int(rest[1]) + 1}_down_channel"
        return ".".join([layer, down, PARTS.get(rest[2], rest[2]), *rest[3:]])
    weight, *paths = NODES[rest[0]]
    if rest[1] == "weights":
        return f"{layer}.{weight}"
    path, part, tail = paths[int(rest[2])], rest[3], rest[4:]
    if part == "resize":
        resize = LOCAL_RESIZE if "_lca_" in path else GLOBAL_RESIZE
        part, tail = resize[tail[0]], tail[1:]
    return ".".join([layer, path, PARTS.get(part, part), *tail])
