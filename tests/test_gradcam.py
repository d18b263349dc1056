"""Grad-CAM against a linear network worked by hand; the network is left as it was."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from histo_utils.networks.gradcam import grad_cam

IMAGE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def pooled_line():
    """1×1 convolution to two channels, global average, linear to two classes."""
    network = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
        network[0].bias.copy_(torch.tensor([0.0, 3.0]))
        network[3].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        network[3].bias.zero_()
    return network


def test_linear_case_by_hand():
    network, images = pooled_line(), IMAGE.expand(2, 1, 2, 2)
    # The maps are x and 3 - x; the gradient of class 0 is 2/4 at each place of the
    # first, that of class 1 is 4/4 of the second. So the heat is x / 2 and
    # (3 - x) cut at 0, over their highest values 2 and 2.
    found = grad_cam(network, network[0], images, [0, 1])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], [[0.25, 0.5], [0.75, 1.0]], atol=1e-6)
    np.testing.assert_allclose(found[1], [[1.0, 0.5], [0.0, 0.0]], atol=1e-6)
    both = grad_cam(network, network[0], images, lambda v: v[:, 0] + v[:, 1])
    # Channels weighted 1/2 and 1: x / 2 + 3 - x = 3 - x / 2, highest 2.5
    np.testing.assert_allclose(both[0], [[1.0, 0.8], [0.6, 0.4]], atol=1e-6)
    one = grad_cam(network, network[0], images, 1)
    np.testing.assert_array_equal(one, np.stack([found[1]] * 2))
    dark = grad_cam(network, network[0], images, lambda v: -v[:, 0])
    assert (dark == 0).all()


def test_similarity_to_a_neighbour_by_hand():
    """Without the last layer the vector is the mean of each map."""
    network = pooled_line()[:3]
    other = torch.tensor([[1.0, 0.0]])
    found = grad_cam(
        network, network[0], IMAGE[None, None], lambda v: F.cosine_similarity(v, other)
    )
    v, x = np.array([2.5, 0.5]), IMAGE.numpy()
    size = np.linalg.norm(v)
    # cos = v_0 / |v|, so its slope is e_0 / |v| - v_0 v / |v|³
    slope = np.array([1.0, 0.0]) / size - v[0] * v / size**3
    heat = np.maximum(slope[0] * x + slope[1] * (3 - x), 0)
    np.testing.assert_allclose(found[0], heat / heat.max(), atol=1e-5)


def test_map_is_enlarged_to_the_image():
    network = nn.Sequential(
        nn.AvgPool2d(4), nn.Conv2d(1, 1, 1, bias=False), nn.Flatten()
    )
    nn.init.ones_(network[1].weight)
    image = F.interpolate(IMAGE[None, None], scale_factor=4)
    found = grad_cam(network, network[1], image, lambda v: v.sum(1))
    assert found.shape == (1, 8, 8)
    expected = F.interpolate(IMAGE[None, None], (8, 8), mode="bilinear")[0, 0] / 4
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    )  # fmt: skip


def test_every_layer_by_loops():
    """Also a frozen network, and a layer whose output is written over (ReLU)."""
    network, images = convolutional().eval(), torch.randn(2, 3, 6, 6)
    network.requires_grad_(False)
    for place in (0, 1, 3):
        found = grad_cam(network, network[place], images, [0, 1])
        for i, number in enumerate((0, 1)):
            values = images[i : i + 1]
            for layer in network[: place + 1]:
                values = layer(values)
            values = values.clone().requires_grad_()
            after = values.clone()
            for layer in network[place + 1 :]:
                after = layer(after)
            after[0, number].backward()
            heat = torch.zeros(6, 6)
            for c in range(values.shape[1]):
                heat += values.grad[0, c].mean() * values.detach()[0, c]
            heat = heat.clamp(min=0)
            np.testing.assert_allclose(found[i], heat / heat.max(), atol=1e-5)


def test_network_is_left_as_it_was():
    network, images = convolutional().train(), torch.randn(2, 3, 6, 6)
    network[3].eval()
    network[3].weight.requires_grad_(False)
    modes = [m.training for m in network.modules()]
    grads = [p.requires_grad for p in network.parameters()]
    state = {k: v.clone() for k, v in network.state_dict().items()}

    def check():
        assert [m.training for m in network.modules()] == modes
        assert [p.requires_grad for p in network.parameters()] == grads
        assert all(p.grad is None for p in network.parameters())
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
        assert not any(m._forward_hooks for m in network.modules())

    with torch.no_grad():  # as inside an evaluation
        grad_cam(network, network[3], images, 0)
    check()
    with pytest.raises(ValueError, match="scores gave"):
        grad_cam(network, network[3], images, lambda v: v)
    check()


def test_bad_input_says_what_to_do():
    network, images = convolutional(), torch.randn(2, 3, 6, 6)
    shared = nn.Conv2d(3, 3, 1)
    twice = nn.Sequential(shared, shared, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    flat = lambda v: torch.zeros(2)  # noqa: E731
    cases = [
        (network, nn.ReLU(), 0, "is not in the network"),
        (network, network[8], 0, "before the pooling"),
        (network, network[3], 2, "classes"),
        (network, network[3], flat, "do not depend"),
        (twice, shared, 0, "ran 2 times"),
    ]
    for net, layer, scores, message in cases:
        with pytest.raises(ValueError, match=message):
            grad_cam(net, layer, images, scores)
