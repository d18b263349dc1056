"""The LGFFEM neck, heads and blocks against golden values, counts and hand work."""

import json

import numpy as np
import pytest
import torch

from histo_utils.encoders.checkpoints import fit_state
from histo_utils.networks.fusion import (
    GRN,
    FusionNode,
    GeM,
    GlobalAggregator,
    LocalAggregator,
    LocalGlobalFusionNeck,
    MultiScaleGeMHead,
)
from histo_utils.networks.published import published_name

IN_CHANNELS = (6, 8, 12, 16)
BASE, TINY = (128, 256, 512, 1024), (96, 192, 384, 768)
P = float(np.float32(4.6))  # the golden values' exponent


@pytest.fixture(scope="module")
def toy(golden):
    arrays = np.load(golden / "lgffem_toy.npz")
    return {name: torch.tensor(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def blocks(golden):
    arrays = np.load(golden / "lgffem_blocks.npz")
    return {name: torch.tensor(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def known(golden):
    return json.loads((golden / "lgffem.json").read_text())


def load_published(module, state, prefix):
    """The authors' weights under their names, which start with the prefix."""
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return fit_state(module, own, prefix, published_name)


def maps(toy, kind):
    return [toy[f"{kind}_P{level}"] for level in range(4)]


def toy_neck(grn="as_published", num_layers=2):
    return LocalGlobalFusionNeck(IN_CHANNELS, 12, num_layers, grn).double().eval()


def toy_head(**options):
    return MultiScaleGeMHead(12, **options).double().eval()


def close(found, expected, atol=1e-9):
    return torch.allclose(found, expected, rtol=0, atol=atol)


def test_golden_neck(toy):
    neck = load_published(toy_neck(), toy, "neck.")
    with torch.no_grad():
        first = neck.layers[0](maps(toy, "in"))
        last = neck(maps(toy, "in"))
    for found, expected in zip(first, maps(toy, "layer0"), strict=True):
        assert close(found, expected)
    for found, expected in zip(last, maps(toy, "out"), strict=True):
        assert close(found, expected)


def test_golden_head(toy, known):
    head = load_published(toy_head(), toy, "head.")
    with torch.no_grad():
        found = head(maps(toy, "out"))
    assert close(found, toy["embedding"])
    norms = found.reshape(2, 4, 12).norm(dim=2).T
    assert close(norms, torch.tensor(known["per_head_norms_toy"]).double(), 1e-6)


def test_golden_grn(blocks):
    outcomes = {"as_published": "original", "channel": "channel_mean_correct"}
    for mode, name in outcomes.items():
        grn = GRN(8, mode).double()
        grn.gamma.data, grn.beta.data = blocks["grn_gamma"], blocks["grn_beta"]
        assert close(grn(blocks["grn_in"]), blocks[f"grn_out_{name}"], 1e-12)


def test_grn_as_published_does_nothing(blocks, known):
    x, grn = blocks["grn_in"], GRN(8, "as_published").double()
    grn.gamma.data.fill_(1.0)
    limit = 1.01 * known["grn_identity_check_max_abs_Nx_minus_1"]
    assert ((grn(x) - x) / x - 1).abs().max() < limit


def test_grn_by_hand():
    """Responses 3 and 1, mean 2: relative 1.5 and 0.5."""
    x = torch.tensor([3.0, 1.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    grn = GRN(2).double()
    grn.gamma.data.fill_(2.0)
    assert close(grn(x).flatten(), torch.tensor([12.0, 2.0]).double(), 1e-5)
    with pytest.raises(ValueError, match="grn='rows'; expected one of channel, as_pub"):
        GRN(2, "rows")


def test_golden_gem(blocks):
    for p, name in ((1, "p1"), (3, "p3"), (P, "p4_6")):
        found = GeM(p).double()(blocks["gem_in"])
        assert close(found, blocks[f"gem_out_{name}"], 1e-12)


def test_a_fusion_node_is_a_weighted_mean():
    node = FusionNode(torch.nn.Identity(), torch.nn.Identity())
    node.weights.data = torch.tensor([1.0, 3.0])
    a, b = torch.full((1, 1, 2, 2), 8.0), torch.full((1, 1, 2, 2), 4.0)
    assert torch.allclose(node(a, b), torch.full((1, 1, 2, 2), 20 / 4.0001))


@pytest.mark.parametrize(
    ("aggregator", "size"),
    [
        (LocalAggregator(4), 6),
        (LocalAggregator(4, upsample=True), 12),
        (GlobalAggregator(4), 6),
        (GlobalAggregator(4, downsample=True), 3),
    ],
)
def test_aggregators_weigh_their_map(aggregator, size):
    """``keep`` = 1 leaves the map as it is; 0 shrinks every value, as a mask does."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        plain = x if aggregator.resize is None else aggregator.resize(x)
        masked = aggregator(x)
        aggregator.keep.fill_(1.0)
        assert torch.equal(aggregator(x), plain)
    assert masked.shape == (2, 4, size, size)
    ratio = masked / plain
    assert ((ratio > 0) & (ratio < 1)).all() and ratio.std() > 0


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "in_channels", "channels", "num_layers"),
    [
        ("convnextv2_base_512x3", BASE, 512, 3),
        ("convnextv2_tiny_512x3", TINY, 512, 3),
        ("convnextv2_base_256x1", BASE, 256, 1),
    ],
)
def test_counts_and_shapes_of_the_papers_sizes(
    known, name, in_channels, channels, num_layers
):
    expected = known[name]
    with torch.device("meta"):
        neck = LocalGlobalFusionNeck(in_channels, channels, num_layers)
        head = MultiScaleGeMHead(channels).eval()
        inputs = [
            torch.empty(1, c, s, s)
            for c, s in zip(in_channels, (56, 28, 14, 7), strict=True)
        ]
    assert n_parameters(neck) == expected["neck_params"]
    assert n_parameters(head) == expected["head_params"]
    first, *later = [n_parameters(layer) for layer in neck.layers]
    assert first == expected["neck_layer0_params"]
    assert set(later) <= {expected["neck_layer_later_params"]}
    fused = neck(inputs)
    assert [list(x.shape) for x in fused] == expected["out_shapes"]
    assert list(head(fused).shape) == expected["embedding"]


def test_every_parameter_learns(toy):
    neck, head = toy_neck("channel"), toy_head().train()
    head([x + 1 for x in neck(maps(toy, "in"))]).square().sum().backward()
    for name, p in [*neck.named_parameters(), *head.named_parameters()]:
        assert p.grad is not None and torch.isfinite(p.grad).all(), name


def test_bad_maps_are_named(toy):
    with pytest.raises(ValueError, match="3 maps and 1 layers"):
        LocalGlobalFusionNeck((4, 8, 16), 8, 1)
    with pytest.raises(ValueError, match="4 maps and 0 layers"):
        LocalGlobalFusionNeck(IN_CHANNELS, 8, 0)
    sides = (25, 13, 7, 4)
    uneven = [torch.rand(1, c, s, s) for c, s in zip(IN_CHANNELS, sides, strict=True)]
    with pytest.raises(ValueError, match=r"\(25, 25\), \(13, 13\).*multiple of"):
        LocalGlobalFusionNeck(IN_CHANNELS, 8, 1)(uneven)


def test_golden_sub_centre_arcface(blocks):
    """The library's loss is the paper's; chapter 08 ties its own lines to it."""
    from pytorch_metric_learning.losses import SubCenterArcFaceLoss

    sizes = {"num_classes": 4, "embedding_size": 6, "sub_centers": 3, "margin": 17.5}
    for scale, name in ((17.5, "17_5_as_run"), (64, "64_as_logged")):
        loss = SubCenterArcFaceLoss(**sizes, scale=scale).double()
        loss.W.data = blocks["arcface_W"]
        found = loss(blocks["arcface_E"], blocks["arcface_y"]).item()
        expected = blocks[f"arcface_loss_scale{name}"].item()
        assert found == pytest.approx(expected, abs=1e-9)
