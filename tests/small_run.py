"""One small training run, for tests that start it here and in processes of its own."""

import time

import pandas as pd
import torch
from torch import nn

from histo_utils.loaders import CachedMaps, training_batches
from histo_utils.losses import MultiSimilarityLoss
from histo_utils.training import fit


class Unit(nn.Module):
    def forward(self, x):
        return nn.functional.normalize(x)


def parts(rate=0.05, dropout=0.3):
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(8, 6), Unit(),
    )  # fmt: skip
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.1)
    return network, optimizer, schedule


LABELS = torch.arange(48) % 4


def data():
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(48, 3, 8, 8, generator=generator)
    images[:, :, 0, 0] += LABELS[:, None] * 2.0
    return CachedMaps([images, images.flip(3)], pd.DataFrame(index=range(48)))


def batches(*sizes, of=None, labels=LABELS, **more):
    """Batches of the small data set."""
    return training_batches(of or data(), labels, slice(None), *sizes, **more)


def run(folder, epochs=6, pause=0.0, fabric=None, dropout=0.3, **more):
    network, optimizer, schedule = parts(dropout=dropout)
    fed = batches(16, 4, seed=1)

    def validate(network):
        time.sleep(pause)
        assert not network.training
        with torch.inference_mode():
            found = network(data().tensors[0])
        return -float(MultiSimilarityLoss()(found, LABELS))

    return fit(
        network, MultiSimilarityLoss(), fed, optimizer=optimizer, epochs=epochs,
        schedule=schedule, folder=folder, validate=validate, fabric=fabric,
        progress=False, **more,
    )  # fmt: skip
