"""Tuning: train an encoder on one split, and describe patches with it meanwhile.

What the chapters that train share: which patches train, from stored maps or from
images, what judges an epoch, and where a run is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from histo_utils import batches, bench, encoders, loaders, metrics, protocols, trials
from histo_utils.networks.projected import Projected
from histo_utils.networks.stages import cut
from histo_utils.training import fit, run_folder

JUDGES = ("p_at_1", "loss")
OPTIMISERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


class Bench(NamedTuple):
    """Patches and how a network sees them.

    Attributes
    ----------
    table : pandas.DataFrame
    views : list of tensors, optional
        What the frozen front gave (`encoders.stored`); without it networks see images.
    first, last : callable, optional
        Transforms of images that train, before ``augment``, and of those described.
    augment : callable, optional
        See `batches.LabelledPatches`.
    workers : int
        Processes that read images.
    """

    table: pd.DataFrame
    views: list | None = None
    first: object = loaders.colour
    last: object = loaders.colour
    augment: object = None
    workers: int = 0


def given_split(table, seed=1) -> trials.Split:
    """Take the published split; a tenth of the training files chooses.

    The tenth is drawn over all files, whatever their class, as Yang et al. (2019) do.

    Parameters
    ----------
    table : pandas.DataFrame
        With ``split``: ``train`` or ``test``.
    """
    train = table["split"].eq("train").to_numpy()
    files = np.random.default_rng(seed).permutation(np.flatnonzero(train))
    choose = np.isin(np.arange(len(table)), files[: max(1, len(files) // 10)])
    return trials.Split("scan", train & ~choose, choose, train, ~train)


def choosable(table, splits) -> list[trials.Split]:
    """Let only patches choose whose class also trains: the others cannot be found."""
    found = []
    for split in splits:
        kinds = trials.classes(table, split.task)
        known = kinds.isin(kinds[split.train]).to_numpy()
        found.append(split._replace(choose=split.choose & known))
    return found


def sizes(splits) -> dict:
    """Count the patches that train, choose, may be found and are asked.

    Parameters
    ----------
    splits : dict
        Task to list of `trials.Split`.

    Returns
    -------
    dict
        ``{"<task> <number>": {"train", "choose", "gallery", "test"}}``
    """
    return {
        f"{task} {number}": {
            part: int(mask.sum())
            for part, mask in split._asdict().items()
            if part != "task"
        }
        for task, some in splits.items()
        for number, split in enumerate(some)
    }


def share_of(labels, train, share, seed=0) -> np.ndarray:
    """Draw a share of the training rows of each class, two at least; sorted rows.

    Parameters
    ----------
    labels : (n,) array
    train : (n,) bool array
    share : float
        Above 0, up to 1. Smaller shares of a seed are parts of larger ones.

    Raises
    ------
    ValueError
        Another share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}; expected more than 0 and at most 1")
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(train))
    kinds = pd.Series(np.asarray(labels)[rows])
    place = kinds.groupby(kinds).cumcount()
    sizes = kinds.groupby(kinds).transform("size")
    return np.sort(rows[(place < np.maximum(2, np.rint(share * sizes))).to_numpy()])


def behind(encoder, stage) -> Projected:
    """Give what of a projected encoder lies behind its frozen stages, to be trained.

    Parts are shared: training these trains the encoder.

    Parameters
    ----------
    encoder : encoders.Encoder
        From `encoders.projected`.
    stage : int
        The first that is trained (`networks.stages.cut`).

    Returns
    -------
    Projected
        The front's map -> unit vectors.
    """
    whole = encoder.network
    _, back = cut(whole.body.network, stage)
    back.dimension = whole.body.dimension
    part = Projected(back, whole.dimension)
    part.projection = whole.projection
    return part.eval()


def optimiser(how, parameters) -> torch.optim.Optimizer:
    """Make an optimiser from text: ``"sgd 0.01"`` (momentum 0.9) or ``"adam 0.001"``.

    Raises
    ------
    ValueError
        Another text.

    Examples
    --------
    >>> optimiser("adam 0.001", [torch.zeros(1)]).defaults["lr"]
    0.001
    """
    name, _, rate = how.partition(" ")
    if name not in OPTIMISERS or not rate:
        raise ValueError(
            f"unknown optimiser {how!r}; expected one of {', '.join(OPTIMISERS)} and a "
            "learning rate, such as 'sgd 0.01'"
        )
    more = {"momentum": 0.9} if name == "sgd" else {}
    return OPTIMISERS[name](parameters, lr=float(rate), **more)


def described(encoder, part, of: Bench, rows):
    """Vectors of some rows of the table with the present weights; zeros elsewhere.

    Parameters
    ----------
    encoder : encoders.Encoder
    part : torch.nn.Module
        What is trained: behind the stored maps, or the encoder's network.
    of : Bench
    rows : array of int, or mask

    Returns
    -------
    Embeddings
        Of the whole table.
    """
    rows = np.arange(len(of.table))[rows]
    vectors = np.zeros((len(of.table), encoder.dimension), np.float32)
    if of.views is None:
        how = {"progress": False, "workers": of.workers}
        made = encoders.embed(encoder, of.table.iloc[rows], of.last, **how)
        vectors[rows] = made.vectors
        return trials.with_vectors(of.table, vectors)
    here = next(part.parameters()).device
    with torch.inference_mode():
        found = [
            part(of.views[0][some].to(here)).cpu()
            for some in torch.as_tensor(rows).split(64)
        ]
    vectors[rows] = torch.cat(found).numpy()
    return trials.with_vectors(of.table, vectors)


def answers(made, split, touching=True, **how) -> dict:
    """Outcomes of the test patches under every protocol of a split's task.

    *organ*, or *scan*, *scan_not_touching* (only if ``touching`` patches are known)
    and *test_among_test* (Yang 2019: no gallery; scans with one test patch left out).
    """
    if split.task == "organ":
        return {"organ": trials.asked(made, split, **how)}
    found = {"scan": trials.asked(made, split, **how)}
    if touching:
        found["scan_not_touching"] = trials.asked(
            made, split, "test", "touching", **how
        )
    tests = bench.as_scans(made).take(split.test)
    tests = tests.take(tests.table["label"].duplicated(keep=False).to_numpy())
    how = how or {"metric": "cosine"}
    return found | {"test_among_test": protocols.leave_one_out(tests, 1, **how)}


def train(
    encoder, part, split, loss, how, of: Bench, *, batch_size, per_class=None,
    steps=None, epochs, share=1.0, seed=0, judge="p_at_1", decay_at=None, settings,
    folder, fabric=None, progress=False,
):  # fmt: skip
    """Train on the training patches of a split, and keep the best epoch.

    Parameters
    ----------
    encoder, part, of
        See `described`; the encoder changes with the part.
    split : trials.Split
    loss : torch.nn.Module
        Without parameters.
    how : str
        See `optimiser`.
    epochs, fabric, progress
        See `training.fit`.
    batch_size, per_class, steps
        See `batches.BatchOrder`.
    share : float
        See `share_of`.
    seed : int
        Of the order of batches and of the share.
    judge : {"p_at_1", "loss"}
        P@1 of the choosing patches among those of the training part, or minus their
        loss, in batches.
    decay_at : int, optional
        Epochs after which, again and again, the learning rate falls to a tenth.
    settings : dict
        What tells this run from another, as JSON can hold it.
    folder : path
        Runs are kept below it, each under the hash of its settings.

    Returns
    -------
    training.Fitted
        Its history has ``images`` besides: those that an epoch trained on.

    Raises
    ------
    ValueError
        An unknown judge or optimiser; and as `share_of` and `training.fit`.
    """
    if judge not in JUDGES:
        raise ValueError(f"unknown judge {judge!r}; valid are {', '.join(JUDGES)}")
    labels = trials.classes(of.table, split.task).to_numpy()
    rows = share_of(labels, split.train, share, seed)
    data = batches.training_data(
        of.table, labels, rows, of.views, of.first, of.augment,
        prepare=encoder.preprocessing,
    )  # fmt: skip
    fed = batches.training_batches(
        data, batch_size, per_class, steps=steps, seed=seed, workers=of.workers,
        fabric=fabric,
    )  # fmt: skip
    choosing = np.flatnonzero(split.choose)
    codes = torch.from_numpy(pd.factorize(labels)[0])

    def p_at_1(part):
        both = np.flatnonzero(split.choose | split.train)
        made = described(encoder, part, of, both)
        return metrics.accuracy(trials.asked(made, split, "choose"))

    def minus_loss(part):
        found = torch.from_numpy(described(encoder, part, of, choosing).vectors)
        mixed = np.random.default_rng(0).permutation(choosing)
        groups = np.array_split(mixed, max(1, len(mixed) // batch_size))
        return -np.mean([float(loss(found[g], codes[g])) for g in groups])

    stepper = optimiser(how, part.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(stepper, decay_at) if decay_at else None
    made = fit(
        part, loss, fed, optimizer=stepper, epochs=epochs, seed=seed, fabric=fabric,
        schedule=schedule, settings=settings, folder=run_folder(folder, settings),
        validate={"p_at_1": p_at_1, "loss": minus_loss}[judge], progress=progress,
    )  # fmt: skip
    return made._replace(history=made.history.assign(images=len(fed) * batch_size))
