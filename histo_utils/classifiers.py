"""Patch classifiers trained in the three ways of Kieffer et al., IPTA 2017.

* ``head``: a new head alone, on the bottleneck features of a frozen network;
* ``tuned``: that head attached, and the last part of the network trained with it;
* ``scratch``: a small network of ours from random weights, on small images.

All minimise the cross-entropy by SGD with momentum 0.9. The class is the slide.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torchvision.transforms import v2

from histo_utils import encoders, loaders, metrics, statistics, trials
from histo_utils.batches import training_batches, training_data
from histo_utils.networks import CBRNet
from histo_utils.networks.tuned import eight_views, halves, new_head, outputs
from histo_utils.training import fit

WAYS = ("head", "tuned", "scratch")
PARTS = ("train", "choose", "test")


class Inputs(NamedTuple):
    """What the three ways train on.

    Attributes
    ----------
    encoder : Encoder
        The network before training; its preprocessing is used.
    table : pandas.DataFrame
    rows : dict
        Positions in the table of ``train``, ``choose`` and ``test``.
    transform : callable
        `loaders.colour` or `loaders.grey`.
    views : dict
        Of each way, one tensor (n, …) a view; None where images are read.
    """

    encoder: encoders.Encoder
    table: pd.DataFrame
    rows: dict
    transform: object
    views: dict

    @property
    def classes(self):
        """Slides, sorted."""
        return np.unique(self.table["slide"])


def gather(
    encoder, table, split, transform, *, turns=2, images=False, small=64, cache=None
) -> Inputs:
    """Run the frozen front of a network over every patch; shrink the patches too.

    Parameters
    ----------
    encoder : Encoder
        From `encoders.frozen`; cut by `networks.tuned.halves`.
    table : pandas.DataFrame
    split : trials.Split
        Or anything with masks ``train``, ``choose`` and ``test``.
    transform : callable
    turns : int
        Views (quarter turns, then mirrored) that the front sees, 1–8.
    images : bool
        Keep no maps: the whole network then runs for each image, augmented.
    small : int
        Side in pixels of the small images; they are turned in all eight ways.
    cache : path, optional
    """
    front, back = halves(encoder.network.network)
    how = {"cache": cache, "progress": False}
    if images:
        whole = nn.Sequential(front, back)
        maps, pooled = (
            None,
            encoders.stored(encoder, whole, table, (0,), transform, **how),
        )
    else:
        maps = encoders.stored(encoder, front, table, range(turns), transform, **how)
        pooled = [outputs(back, view) for view in maps]
    same, size = nn.Identity(), loaders.Preprocessing(size=small)
    pixels = encoders.Encoder("pixels", same, size, 0, encoders.Card("none", "none"))
    tiny = encoders.stored(pixels, same, table, (0,), transform, progress=False)[0]
    rows = {part: np.flatnonzero(getattr(split, part)) for part in PARTS}
    views = {"head": pooled, "tuned": maps, "scratch": eight_views(tiny)}
    return Inputs(encoder, table, rows, transform, views)


def start(inputs, way, *, hidden=256, widths=(32, 64, 128), seed=0, head=None):
    """Build the network of a way before training.

    Parameters
    ----------
    inputs : Inputs
    way : {"head", "tuned", "scratch"}
    hidden : int
        Width of the head's first layer.
    widths : sequence of int
        Channels of the network from scratch (`networks.CBRNet`).
    seed : int
        Of what is random.
    head : torch.nn.Module
        For ``tuned``: the trained head; trained further, so give a fresh one.

    Returns
    -------
    torch.nn.Module
        ``tuned``: (front, back, head) from images, (back, head) from maps; in
        evaluation mode, so batch norms keep the statistics they came with.

    Raises
    ------
    ValueError
        An unknown way, or ``tuned`` without a head.
    """
    classes, views = len(inputs.classes), inputs.views.get(way)
    if way not in WAYS or (way == "tuned" and head is None):
        raise ValueError(
            f"way={way!r}, head={head}; expected one of {', '.join(WAYS)}, and for "
            "tuned a trained head"
        )
    if way == "head":
        return new_head(views[0].shape[1], hidden, classes, seed)
    if way == "scratch":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return CBRNet(widths, classes)
    front, back = halves(inputs.encoder.network.network)
    parts = [front] if views is None else []
    return nn.Sequential(*parts, back.requires_grad_(True), head).eval()


def given(network, inputs, way, rows) -> torch.Tensor:
    """Run a network on some rows of the table, as they are (not turned)."""
    views = inputs.views[way]
    if views is not None:
        return outputs(network, views[0][rows])
    some, how = inputs.table.iloc[rows], (inputs.transform,)
    found = encoders.stored(inputs.encoder, network, some, (0,), *how, progress=False)
    return found[0]


def told(network, inputs, way, part="test") -> pd.DataFrame:
    """Outcomes of a part: the class of the largest output is the answer.

    Parameters
    ----------
    part : {"choose", "test"}

    Returns
    -------
    pandas.DataFrame
        The rows of the table, with ``query`` (position in it), ``label`` (the slide)
        and ``predicted``.
    """
    rows = inputs.rows[part]
    answer = inputs.classes[given(network, inputs, way, rows).argmax(1).numpy()]
    some = inputs.table.iloc[rows].reset_index(drop=True)
    return some.assign(query=rows, label=some["slide"], predicted=answer)


def augmentation(shear=0.2, zoom=0.2):
    """Shear, zoom and mirror images, as Keras' well-known fine-tuning example does.

    Kieffer et al. do not list theirs. Keras takes the shear in radians. What comes in
    at the edge is white, and both axes are zoomed alike (ours).
    """
    degrees = float(np.degrees(shear))
    scale = (1 - zoom, 1 + zoom)
    bent = v2.RandomAffine(0, scale=scale, shear=(-degrees, degrees), fill=255)
    return v2.Compose([bent, v2.RandomHorizontalFlip()])


def train(
    network, inputs, way, *, rate, epochs, folder, batch_size=32, steps=None, seed=0,
    workers=0, settings=None, progress=False,
):  # fmt: skip
    """Train a network; the epoch is chosen by the share right of the choosing part.

    Parameters are those of `training.fit` and `batches.training_batches`; ``rate`` is
    SGD's, its momentum 0.9.

    Returns
    -------
    training.Fitted
    """
    data = training_data(
        inputs.table, inputs.table["slide"], inputs.rows["train"], inputs.views[way],
        inputs.transform, augmentation(), prepare=inputs.encoder.preprocessing,
    )  # fmt: skip
    moving = [p for p in network.parameters() if p.requires_grad]
    fed = training_batches(data, batch_size, steps=steps, seed=seed, workers=workers)
    return fit(
        network, nn.CrossEntropyLoss(), fed, epochs=epochs, folder=folder, seed=seed,
        optimizer=torch.optim.SGD(moving, rate, momentum=0.9), settings=settings,
        validate=lambda net: metrics.accuracy(told(net, inputs, way, "choose")),
        progress=progress,
    )  # fmt: skip


def drawn(table, count, seed=0) -> tuple[pd.DataFrame, trials.Split]:
    """Draw training patches of a published split, and a tenth as many that choose.

    Kieffer et al. draw 100 of each class; that others choose is ours.

    Parameters
    ----------
    table : pandas.DataFrame
        With ``split``: ``train`` or ``test``.
    count : int
        Training patches of each class; fewer where a class has fewer.
    seed : int

    Returns
    -------
    table : pandas.DataFrame
        The rows that are used, without ``split``.
    split : trials.Split
        All test patches are asked, against those that train.
    """
    mixed = table.sample(frac=1, random_state=seed).groupby(["split", "slide"])
    place = mixed.cumcount().reindex(table.index)
    few = count + max(1, count // 10)
    is_part = table["split"].eq("test"), place < count, place < few
    part = np.select(is_part, ("test", "train", "choose"), "")
    used, names = part != "", ("train", "choose", "train", "test")
    split = trials.Split("scan", *(part[used] == name for name in names))
    return table[used].drop(columns="split").reset_index(drop=True), split


def etas(outcomes, n_boot=2000, seed=0) -> dict:
    """η_p, η_w and η_total of outcomes, with intervals over patients.

    Returns
    -------
    dict
        ``eta_p`` (``low``, ``high``), ``eta_w``, ``eta_total`` (``eta_total_low``,
        ``eta_total_high``), ``queries``, ``patients``. In a draw of the bootstrap a
        class weighs what it weighs in the whole.
    """
    hit, patient = metrics.accuracy(outcomes, per_query=True), outcomes["patient"]
    label, draws = outcomes["label"], {"n_boot": n_boot, "seed": seed}
    three = metrics.eta_scores(label, outcomes["predicted"], label.nunique())
    found = dict(zip(("eta_p", "eta_w", "eta_total"), three, strict=True))
    found["low"], found["high"] = statistics.bootstrap_ci(hit, patient, **draws)
    weight = 1 / label.groupby(label).transform("size").to_numpy()
    rows = np.stack([hit, hit * weight, weight], axis=1)
    ends = statistics.bootstrap_ci(rows, patient, statistic=_total, **draws)
    found["eta_total_low"], found["eta_total_high"] = ends
    return found | {"queries": len(hit), "patients": patient.nunique()}


def _total(rows):
    """η_p times η_w of rows (hit, hit · weight, weight)."""
    hit, right, weight = rows.sum(axis=0)
    return hit / len(rows) * right / weight
