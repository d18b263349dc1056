"""The networks of Yang 2019 and our small one: golden blocks, counts, shapes."""

import json

import numpy as np
import pytest
import torch

from histo_utils.encoders import NETWORKS as NAMED
from histo_utils.networks import (
    ABEM,
    BranchedAttentionResNet50,
    CBRNet,
    MixedAttentionSEResNet50,
)
from histo_utils.networks.attention import Bottleneck, SEModule
from histo_utils.networks.ensemble import Inception


@pytest.fixture(scope="module")
def blocks(golden):
    return np.load(golden / "dml_blocks.npz")


@pytest.fixture(scope="module")
def shapes(golden):
    return json.loads((golden / "dml_model_shapes.json").read_text())


def check_block(arrays, name, module, rename=lambda key: key):
    """Load a golden block's weights into ours and compare the outcome."""
    start = f"{name}.w."
    state = {
        rename(key.removeprefix(start)): torch.tensor(arrays[key])
        for key in arrays
        if key.startswith(start)
    }
    module = module.double().eval()
    module.load_state_dict(state)
    with torch.no_grad():
        found = module(torch.tensor(arrays[f"{name}.in"])).numpy()
    np.testing.assert_allclose(found, arrays[f"{name}.out"], rtol=0, atol=1e-12)


def test_golden_blocks(blocks):
    def rename(key):  # b1.0.weight -> branches.0.0.weight
        return f"branches.{int(key[1]) - 1}{key[2:]}"

    check_block(blocks, "se_module", SEModule(16, rd_channels=4))
    check_block(blocks, "se_bottleneck_s1", Bottleneck(16, 4, 1, reduction=4))
    check_block(blocks, "se_bottleneck_s2", Bottleneck(12, 4, 2, reduction=4))
    check_block(blocks, "inception_bn", Inception(6, 4, 3, 5, 2, 3, 2), rename)


def test_the_first_pool_rounds_up_and_has_no_border():
    """Of 1 … 6 in a row: max of 1-3, 3-5 and the rest, 5-6; a border would give 2."""
    pool = MixedAttentionSEResNet50().stem[-1]
    x = torch.arange(1.0, 7.0).expand(1, 1, 6, 6)
    assert pool(x)[0, 0, 0].tolist() == [3.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("build", "gate"), [(BranchedAttentionResNet50, torch.sigmoid), (ABEM, torch.relu)]
)
@pytest.mark.parametrize("value", [-2.0, 3.0])
def test_what_closes_a_mask(build, gate, value):
    """Sigmoid for the residual network, ReLU for the ensemble."""
    conv, norm, _ = mask = build(learners=1).eval().masks[0]
    torch.nn.init.zeros_(norm.weight)
    torch.nn.init.constant_(norm.bias, value)
    with torch.no_grad():
        found = mask(torch.rand(1, conv.in_channels, 2, 2))
    assert torch.allclose(found, gate(torch.tensor(value)).expand_as(found))


# network, its golden record, our parts against the released code's
SE_PARTS = {
    "stem": ["layers0"], "stage1": ["layers1"], "stage2": ["layers2"],
    "stage3": ["layers3"], "mask": ["att_layer"], "stage4": ["layers4"],
    "embed": ["last_linear"],
}  # fmt: skip
BRANCHED_PARTS = {
    **{part: names for part, names in SE_PARTS.items() if part != "mask"},
    "attention": ["att_layer"], "masks": ["att_branches"],
}  # fmt: skip
FOURS = ["a4", "b4", "c4", "d4", "e4"]
ABE_PARTS = {
    "stem": ["prelayer"], "stage3": ["a3", "b3"], "stage4": FOURS,
    "attention": [f"att_{name}" for name in FOURS], "masks": ["att_conv_branches"],
    "stage5": ["a5", "b5"], "dropout": ["dropout"], "embed": ["linear"],
}  # fmt: skip
NETWORKS = {
    "se_resnet50_attention": (MixedAttentionSEResNet50, {}, SE_PARTS),
    "se_resnet50_no_attention": (
        MixedAttentionSEResNet50,
        {"attention": False},
        {part: names for part, names in SE_PARTS.items() if part != "mask"},
    ),
    "resnet50_M4_attention": (BranchedAttentionResNet50, {}, BRANCHED_PARTS),
    "ABE_M4": (ABEM, {}, ABE_PARTS),
}
TOTALS = dict(
    zip(NETWORKS, (45_731_440, 27_088_112, 47_131_840, 10_534_720), strict=True)
)


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


def without_weights(name):
    build, options, _ = NETWORKS[name]
    with torch.device("meta"):
        return build(**options)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_counts(shapes, name):
    network, parts = without_weights(name), NETWORKS[name][2]
    assert n_parameters(network) == shapes[name]["params"] == TOTALS[name]
    expected = shapes[name]["params_by_child"]
    found = {part: n_parameters(child) for part, child in network.named_children()}
    assert found == {
        part: sum(expected[child] for child in names) for part, names in parts.items()
    }


@pytest.mark.parametrize(
    ("name", "count"),
    [("branched_attention_resnet50", 47_131_840), ("abe_m", 10_534_720)],
)
def test_an_ensemble_by_name_has_the_papers_size_and_512_dimensions(name, count):
    """As chapter 07 builds it: ``dim`` is that of all learners together."""
    with torch.device("meta"):
        network = NAMED[name](dim=512)
    assert n_parameters(network) == count and network.learners == 4
    assert network(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 512)


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_for_224_pixels(shapes, name):
    """Every part's outputs, as often as it runs; meta tensors: nothing is computed."""
    network, golden = without_weights(name), shapes[name]
    seen = {}

    def note(part):
        def hook(module, inputs, output):
            seen.setdefault(part, []).append(list(output.shape))

        return hook

    for part, child in network.named_children():
        child.register_forward_hook(note(part))
    outputs = network(torch.empty(2, 3, 224, 224, device="meta"))
    outputs = outputs if isinstance(outputs, list) else [outputs]
    assert [list(x.shape) for x in outputs] == golden["outputs"]
    expected = {
        part: golden["child_output_shapes"][names[-1]]
        for part, names in NETWORKS[name][2].items()
        if names[-1] in golden["child_output_shapes"]
    }
    if name == "ABE_M4":  # its pools belong to our stages
        first, *rest = golden["child_output_shapes"]["maxpool"]
        expected |= {"stage3": [first], "stage4": rest}
    for part, known in expected.items():  # a shared tower runs only once
        once = part in ("attention", "mask")
        assert seen[part] == (known[:1] if once else known), part


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_unit_vectors_of_any_size_of_image(name):
    torch.manual_seed(0)
    build, options, _ = NETWORKS[name]
    network = build(**options).eval()
    with torch.no_grad():
        found = network(torch.rand(2, 3, 75, 70))
    for x in found if isinstance(found, list) else [found]:
        assert torch.allclose(x.norm(dim=1), torch.ones(2), atol=1e-5)


def test_the_mask_multiplies_the_map():
    """A mask that is the same everywhere scales the channels by the sigmoid of it."""
    torch.manual_seed(0)
    network = MixedAttentionSEResNet50(dim=8).eval()
    torch.nn.init.zeros_(network.embed.bias)  # else the bias drowns the image
    norm = network.mask[-2]
    torch.nn.init.zeros_(norm.weight)
    torch.nn.init.normal_(norm.bias, std=3)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = network.stage3(network.stage2(network.stage1(network.stem(x))))
        masked = maps * torch.sigmoid(norm.bias)[:, None, None]
        expected, plain = (
            torch.nn.functional.normalize(network.embed(network.stage4(m).mean((2, 3))))
            for m in (masked, maps)
        )
        assert torch.allclose(network(x), expected, atol=1e-6)
        assert not torch.allclose(expected, plain, atol=1e-3)
        network.mask = None
        assert torch.allclose(network(x), plain, atol=1e-6)


@pytest.mark.parametrize(
    "network",
    [
        BranchedAttentionResNet50(learners=2, dim=12),
        ABEM(learners=2, dim=12, dropout=0.0),
    ],
    ids=lambda network: type(network).__name__,
)
def test_learners_differ_only_by_their_mask(network):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        # in training mode: an untrained network in evaluation mode sees hardly anything
        a, b = network.train()(x)
        network.masks[1].load_state_dict(network.masks[0].state_dict())
        c, d = network(x)
    assert a.shape == (2, 6) and torch.equal(a, c) and torch.equal(c, d)
    assert not torch.allclose(a, b, atol=1e-2)


def test_impossible_sizes_are_refused():
    for build in (ABEM, BranchedAttentionResNet50):
        with pytest.raises(ValueError, match="100 dimensions cannot be shared by 3"):
            build(learners=3, dim=100)
    with pytest.raises(ValueError, match="without widths"):
        CBRNet(())


def test_the_small_network():
    """Per stage 9 weights per pair of channels and two of the batch norm."""
    assert n_parameters(CBRNet()) == 388_896 and n_parameters(CBRNet(dim=24)) == 395_064
    by_hand = 9 * 3 * 4 + 2 * 4 + 9 * 4 * 8 + 2 * 8 + (8 + 1) * 3
    assert n_parameters(CBRNet((4, 8), dim=3)) == by_hand
    x = torch.rand(2, 3, 50, 33)
    assert CBRNet((4, 8), dim=3)(x).shape == (2, 3)
    assert CBRNet((4, 8))(x).shape == (2, 8)


def test_the_small_network_by_hand():
    """One stage whose kernel copies the red channel: the mean of its 2 × 2 maxima."""
    network = CBRNet((1,)).eval()
    kernel = torch.zeros(1, 3, 3, 3)
    kernel[0, 0, 1, 1] = (1 + 1e-5) ** 0.5  # undoes the batch norm's eps
    network.stages[0][0].weight.data = kernel
    x = torch.rand(2, 3, 6, 6) - 0.5
    tiles = x[:, 0].clamp(min=0).reshape(2, 3, 2, 3, 2)
    expected = tiles.amax((2, 4)).mean((1, 2))[:, None]
    assert torch.allclose(network(x), expected, atol=1e-6)
