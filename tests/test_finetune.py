"""Which parameters are trained: SEEDS' arithmetic; a cut network is the same one."""

import pytest
import timm
import torch
from torch import nn

from histo_utils.encoders import Pooled
from histo_utils.networks.finetune import PARTS, cut, digest, new_head, train_only


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
    named = network.named_parameters()
    trained = {name.split(".")[0] for name, p in named if p.requires_grad}
    assert trained == {"Mixed_7b", "Mixed_7c"}


def dense_layers(first, count, growth=32):
    """Parameters of a dense block: two norms and two convolutions per layer."""
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
    assert counts["I"] == four
    assert counts["II"] == four + three
    assert counts["III"] == four + three + two
    assert counts["IV"] == 6_953_856 + 1024 * 1000 + 1000  # and the classifier
    small = on_meta("mobilenetv2_100")
    nested = [train_only(small, p) for p in PARTS["mobilenetv2_100"].values()]
    assert nested == sorted(set(nested))


def test_a_wrong_beginning_is_refused():
    with pytest.raises(ValueError, match=r"'block5.'; this network's parts are feat"):
        train_only(on_meta("vgg16"), ["block5."])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "stage"),
    [("mobilenetv2_035", 64, 0), ("mobilenetv2_035", 64, 3), ("mobilenetv2_035", 64, 7),
     ("mobilenetv2_035", 64, None), ("vgg16", 64, None), ("inception_v3", 96, None)],
)  # fmt: skip
def test_a_cut_network_is_the_same_one(name, side, stage):
    network = timm.create_model(name).eval()
    front, back = cut(Pooled(network), stage)
    x = torch.rand(2, 3, side, side)
    with torch.inference_mode():
        whole = network.forward_features(x)
        if hasattr(network, "blocks"):
            whole = network.forward_head(whole, pre_logits=True)
        else:
            whole = whole.flatten(1) if name == "vgg16" else whole.mean((2, 3))
        torch.testing.assert_close(back(front(x)), whole)
    assert {*map(id, back.parameters())} <= {*map(id, network.parameters())}


def test_without_a_front_all_is_trained_and_unknown_cuts_are_refused():
    network = Pooled(on_meta("vgg16"))
    assert cut(network, -1) == (None, network)
    with pytest.raises(ValueError, match="VGG has no known cut"):
        cut(on_meta("vgg16"), 3)
    with pytest.raises(ValueError, match="VGG has no known cut"):
        cut(on_meta("vgg11"))
    with pytest.raises(ValueError, match="stages 0 to 7"):
        cut(on_meta("mobilenetv2_100"), 8)


def test_new_head_by_arithmetic_and_by_seed():
    heads = [new_head(2048, 256, 9, 0.5, seed=s) for s in (0, 0, 1)]
    count = sum(p.numel() for p in heads[0].parameters())
    assert count == 2048 * 256 + 256 + 256 * 9 + 9
    kinds = [type(part).__name__ for part in heads[0]]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear"]
    assert len(new_head(4, 3, 2)) == 3
    hashes = [digest(head) for head in heads]
    assert hashes[0] == hashes[1] != hashes[2]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    new_head(4, 3, 2, seed=1)
    torch.testing.assert_close(torch.rand(3), expected)  # the caller's are left alone


def test_the_digest_sees_a_buffer_that_moved():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    before = digest(net)
    net.train()(torch.randn(4, 3, 8, 8))  # no gradient, and yet the means move
    assert digest(net) != before
