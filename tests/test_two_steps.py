"""Step 1 leaves the body as it is, bit by bit, batch norm included; step 2 does not."""

import pytest
import torch
from torch import nn

from histo_utils.batches import StoredInputs, training_batches
from histo_utils.networks.two_steps import answers, digest, set_step, with_head
from histo_utils.training import fit


def body():
    torch.manual_seed(1)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *pooled)


def run(net, number, folder, seen=None):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(24, 3, 8, 8, generator=generator)
    trained = set_step(net, number)
    batches = training_batches(StoredInputs([images], torch.arange(24) % 3), 8)
    optimizer = torch.optim.Adam(trained, 0.01)
    fit(
        net, nn.CrossEntropyLoss(), batches, optimizer=optimizer, epochs=2,
        folder=folder, progress=False,
    )  # fmt: skip


def test_step_1_leaves_the_body_bit_identical_and_step_2_trains_it(tmp_path):
    net = with_head(body(), 6, 3, hidden=5)
    frozen, head = digest(net.body), digest(net.head)
    run(net, 1, tmp_path / "1")
    assert digest(net.body) == frozen == digest(body())
    assert digest(net.head) != head
    assert all(p.grad is None for p in net.body.parameters())
    run(net, 2, tmp_path / "2")
    assert digest(net.body) != frozen
    assert torch.equal(net.body[1].running_mean, body()[1].running_mean)


def test_the_digest_sees_a_buffer_that_moved():
    net = with_head(body(), 6, 3)
    before = digest(net.body)
    net.train()  # what set_step avoids: no gradient, and yet the means move
    net(torch.randn(4, 3, 8, 8))
    assert digest(net.body) != before


def test_the_head_by_arithmetic_and_by_seed():
    nets = [with_head(body(), 2048, 9, seed=s) for s in (0, 0, 1)]
    counts = [sum(p.numel() for p in set_step(nets[0], k)) for k in (1, 2)]
    assert counts[0] == 2048 * 256 + 256 + 256 * 9 + 9
    assert counts[1] - counts[0] == 3 * 6 * 9 + 6 + 6 + 6
    hashes = [digest(net.head) for net in nets]
    assert hashes[0] == hashes[1] != hashes[2]
    training = [name for name, part in nets[0].named_modules() if part.training]
    assert training == ["head.2"]  # dropout alone
    with pytest.raises(ValueError, match="step 3; there are steps 1"):
        set_step(nets[0], 3)


def test_answers_are_those_of_the_largest_output():
    head = nn.Linear(3, 3, bias=False)
    head.weight.data = torch.eye(3)
    assert answers(head, torch.eye(3)[[2, 0, 1]]).tolist() == [2, 0, 1]
