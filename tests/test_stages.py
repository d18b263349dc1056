"""Which parameters are trained: SEEDS' arithmetic; a cut network is the same one."""

import pytest
import timm
import torch

from histo_utils.networks.stages import PARTS, cut, train_only


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


def test_block_5_of_vgg16_has_the_papers_count():
    network = on_meta("vgg16")
    assert train_only(network, PARTS["vgg16"]["block 5"]) == 3 * (512 * 512 * 9 + 512)
    assert train_only(network, ("",)) == sum(p.numel() for p in network.parameters())


def test_last_two_blocks_of_inception():
    network = on_meta("inception_v3")
    train_only(network, PARTS["inception_v3"]["last two blocks"])
    trained = {
        n.split(".")[0] for n, p in network.named_parameters() if p.requires_grad
    }
    assert trained == {"Mixed_7b", "Mixed_7c"}


def dense_layers(first, count, growth=32):
    """Parameters of a dense block: two norms and two convolutions a layer."""
    total = 0
    for i in range(count):
        width = first + i * growth
        total += 2 * width + width * 128 + 2 * 128 + 128 * growth * 9
    return total


def test_densenet_configurations_by_arithmetic():
    network = on_meta("densenet121")
    four = dense_layers(512, 16) + 2 * 1024
    three = dense_layers(256, 24) + 2 * 1024 + 1024 * 512
    two = dense_layers(128, 12) + 2 * 512 + 512 * 256
    counts = {name: train_only(network, p) for name, p in PARTS["densenet121"].items()}
    classifier = 1024 * 1000 + 1000
    assert counts["I"] == four
    assert counts["II"] == four + three
    assert counts["III"] == four + three + two
    assert counts["IV"] == 6_953_856 + classifier


def test_stand_in_configurations_contain_each_other():
    network = on_meta("mobilenetv2_100")
    counts = [train_only(network, p) for p in PARTS["mobilenetv2_100"].values()]
    assert counts == sorted(set(counts))


def test_a_wrong_beginning_is_refused():
    with pytest.raises(ValueError, match=r"'block5.'; this network's parts are feat"):
        train_only(on_meta("vgg16"), ["block5."])


@pytest.mark.parametrize("stage", [0, 3, 7])
def test_a_cut_network_is_the_same_one(stage):
    network = timm.create_model("mobilenetv2_035", pad_type="same").eval()
    front, back = cut(network, stage)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        whole = network.forward_head(network.forward_features(x), pre_logits=True)
        torch.testing.assert_close(back(front(x)), whole)
    assert {*map(id, back.parameters())} <= {*map(id, network.parameters())}


def test_only_networks_of_blocks_are_cut():
    with pytest.raises(ValueError, match="VGG is not built"):
        cut(on_meta("vgg16"), 3)
    with pytest.raises(ValueError, match="stages 0 to 7"):
        cut(on_meta("mobilenetv2_100"), 8)
