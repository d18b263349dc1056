"""Placement on "cuda" without a GPU: fake tensors know their device, not their values.

Forward passes and losses run with everything on "cuda"; an operation on two devices
raises, as it would there. Backward needs a device, so it runs on fake CPU tensors.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import SubCenterArcFaceLoss
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from histo_utils import encoders, loaders, losses, networks, training
from histo_utils.encoders import embedding
from histo_utils.networks import finetune, gradcam
from histo_utils.networks.projected import Pooled, Projected


@contextlib.contextmanager
def fake(device="cuda"):
    """What is made inside is fake, and on the device unless it says otherwise."""
    with FakeTensorMode(), torch.device(device):
        yield


def timm_network(name="mobilenetv2_035", **how):
    import timm

    return Pooled(timm.create_model(name, **how))


def fused():
    neck = networks.LocalGlobalFusionNeck([4, 6, 8, 12], channels=8, num_layers=2)
    return nn.Sequential(neck, networks.MultiScaleGeMHead(8))


class Arcface(nn.Module):
    """The loss of chapter 08 up to its margin.

    There it takes what a mask selects, how many fake tensors cannot know.
    """

    def __init__(self):
        super().__init__()
        sizes = {"num_classes": 3, "embedding_size": 32, "sub_centers": 2}
        self.whole = SubCenterArcFaceLoss(**sizes)
        # made on the CPU whatever the device; `fit` moves it, fake modules do not move
        self.whole.W = nn.Parameter(torch.empty(self.whole.W.shape))

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.whole.get_cosine(x), labels)


def images(side=64):
    return torch.zeros(4, 3, side, side)


def four_maps():
    sizes = zip((4, 6, 8, 12), (16, 8, 4, 2), strict=True)
    return [torch.zeros(4, c, s, s) for c, s in sizes]


MIXED, BRANCHED = networks.MixedAttentionSEResNet50, networks.BranchedAttentionResNet50
TRAINED = {
    "cbr": (lambda: networks.CBRNet((4, 8), 3), nn.CrossEntropyLoss, images),
    "mixed": (lambda: MIXED(dim=8), losses.MultiSimilarityLoss, images),
    "branched": (lambda: BRANCHED(2, 8), losses.ABELoss, images),
    "abe_m": (lambda: networks.ABEM(2, 8), losses.ABELoss, images),
    "joined": (lambda: networks.Joined(networks.ABEM(2, 8)), losses.ContrastiveLoss,
               images),
    "projected": (lambda: Projected(timm_network(), 8), losses.MultiSimilarityLoss,
                  images),
    "new head": (lambda: nn.Sequential(timm_network(), finetune.new_head(1280, 8, 3)),
                 nn.CrossEntropyLoss, images),
    "fusion": (fused, Arcface, four_maps),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step(name, device):
    network, loss, items = TRAINED[name]
    one = SimpleNamespace(world_size=1)
    with fake(device):
        network, loss = network().train(), loss()
        inputs = training._channels_last(items())
        labels = torch.zeros(4, dtype=torch.long)
        outputs, labels = training._global((network(inputs), labels), one)
        value = loss(training._float32(outputs), labels)
        assert value.shape == () and value.device.type == device
        if device == "cpu":
            value.backward()
            named = network.named_parameters()  # timm's classifier is not asked
            assert all(p.grad is not None for n, p in named if "classifier" not in n)


def front():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU())


def test_maps_of_a_network_that_was_left_on_the_gpu():
    with fake():
        flat = embedding._Flat(front(), 32)
        assert flat(images(32)).device.type == "cuda"
        assert flat.dimension == 4 * 15 * 15


def test_zeros_on_the_cpu_are_noticed(monkeypatch):
    """The defect that the test above is there for: `_Flat` fed zeros on the CPU."""

    def zeros(*shape, device=None):
        return torch.empty(*shape, device="cpu")

    with fake():
        network = front()
        monkeypatch.setattr(embedding.torch, "zeros", zeros)
        with pytest.raises(RuntimeError, match="device"):
            embedding._Flat(network, 32)


def batches(data, size, num_workers):
    """Stand in for a DataLoader, which asks a generator for a number."""
    items = [data[i] for i in range(len(data))]
    for start in range(0, len(items), size):
        some = items[start : start + size]
        several = isinstance(some[0], list)
        yield (
            [*map(torch.stack, zip(*some, strict=True))]
            if several
            else torch.stack(some)
        )


def items_of(given):
    """Items on the CPU, as a data set gives them."""
    if torch.is_tensor(given):
        return [*given.cpu()]
    return [[m[i].cpu() for m in given] for i in range(len(given[0]))]


@pytest.mark.parametrize("name", ["cbr", "projected", "fusion", "front"])
def test_outputs_come_back_to_the_cpu(monkeypatch, name):
    make, _, given = TRAINED.get(name, (front, None, images))
    monkeypatch.setattr(loaders, "DataLoader", batches)
    with fake():
        network = make().train()
        items = items_of(given())
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = loaders.outputs(network, items, batch_size=3)
    assert len(found) == 4 and found.device.type == "cpu"
    assert network.training and next(network.parameters()).device.type == "cuda"


class Placed(networks.CBRNet):
    """Knows where it was put, without a GPU."""

    def to(self, device):
        self.place = torch.device(device)
        return self

    def parameters(self, recurse=True):
        yield SimpleNamespace(device=self.place)


@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize("fails", [False, True])
def test_embed_leaves_the_network_where_it_was(monkeypatch, patches, home, fails):
    seen = []

    def outputs(network, data, *how, **more):
        seen.append(network.place.type)
        if fails:
            raise OSError("a patch cannot be read")
        return torch.zeros(len(data), 8)

    monkeypatch.setattr(embedding, "outputs", outputs)
    network = Placed((4, 8)).to(home)
    card = encoders.Card("none", "mean")
    encoder = encoders.Encoder("small", network, loaders.Preprocessing(), 8, card)
    with pytest.raises(OSError) if fails else contextlib.nullcontext():
        encoders.embed(encoder, patches, device="cuda", progress=False)
    assert seen == ["cuda"] and network.place.type == home


@pytest.mark.parametrize("name, side", [("mobilenetv2_035", 64), ("vgg16", 64)])
def test_both_halves_of_a_cut(name, side):
    with fake():
        frozen, trained = finetune.cut(timm_network(name))
        flat = embedding._Flat(frozen.eval(), side)
        maps = flat.back(flat(images(side)))
        assert trained(maps).device.type == "cuda"


def test_grad_cam(monkeypatch):
    with fake():
        network = networks.CBRNet((4, 8))
        values = gradcam._scored(network(images()), lambda y: y.sum(1), 4)
        assert values.device.type == "cuda"
    monkeypatch.setattr(FakeTensor, "numpy", lambda self: np.zeros(self.shape))
    with fake("cpu"):  # all of it, its gradient included
        network = networks.CBRNet((4, 8))
        like = networks.CBRNet((4, 8))(images())
        found = gradcam.grad_cam(network, network.stages[0], images(),
            lambda y: nn.functional.cosine_similarity(y, like))  # fmt: skip
    assert found.shape == (4, 64, 64)
