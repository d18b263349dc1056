"""Protocols: the splits of a task, and which gallery a query searches.

Embeddings in, *outcomes* out: a DataFrame with one row per query that every metric and
table takes.

======================  =======================================================
``query``               row of the query in its Embeddings (a slide's place in
                        `slide_search`)
``label``               its label
``predicted``           label of the nearest neighbour; the majority vote of the k
                        nearest in `slide_search`; the class in `linear_probe`
``patient``, ``slide``  of the query (None where the table does not know)
``neighbours``          (k,) gallery rows, nearest first; None for classifiers
``neighbour_labels``    their labels; None for classifiers
``distances``           their distances; None for classifiers
``relevant``            gallery items of the query's label that it may find (the R of
                        MAP@R); None for classifiers
======================  =======================================================

With ``system``, ``protocol`` and ``seed`` added, outcomes of several runs stand in one
table (`statistics.score_table`).
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from histo_utils.embeddings import Embeddings, standardise
from histo_utils.search import (
    Archive,
    bag_distances,
    check_columns,
    check_k,
    count_relevant,
    exclusion_mask,
    minmax_barcode,
)

C_VALUES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TASKS = ("scan", "organ")


class Split(NamedTuple):
    """Masks over the rows of a patch table: train, validation, gallery and test.

    The validation patches choose epochs and constants; test patches search the gallery
    and are scored once.
    """

    task: str
    train: np.ndarray
    validation: np.ndarray
    gallery: np.ndarray
    test: np.ndarray

    def take(self, rows) -> Split:
        """Return the split of some rows of the table."""
        return Split(self.task, *(mask[rows] for mask in self[1:]))

    def known(self, labels) -> Split:
        """Leave out validation patches whose label no training patch has."""
        labels = np.asarray(labels)
        seen = np.isin(labels, labels[self.train])
        return self._replace(validation=self.validation & seen)

    def thinned(self, most, labels) -> Split:
        """Keep at most so many training rows, and validation rows of their classes."""
        rows = np.flatnonzero(self.train)
        train = np.isin(np.arange(len(labels)), rows[:: -(-len(rows) // most)])
        known = self.validation & np.isin(labels, labels[train])
        return self._replace(train=train, validation=known)

    def sizes(self) -> dict:
        """Count the patches of each part."""
        parts = zip(self._fields[1:], self[1:], strict=True)
        return {name: int(mask.sum()) for name, mask in parts}


def splits(table: pd.DataFrame, task: str) -> list[Split]:
    """All splits of a task of the bench.

    Parameters
    ----------
    table : pandas.DataFrame
        Patches with ``slide``, ``x``, ``y``; with ``fold`` (of patients) for organs.
    task : {"scan", "organ"}
        *scan*: the upper half of every scan trains and is the gallery, the lower left
        quarter validates, the lower right is the test; one split. *organ*: each fold of
        patients is the test once, against all others as gallery; of these, the next
        fold validates and the rest train.

    Raises
    ------
    ValueError
        An unknown task; fewer than three folds, or a patient in two.
    """
    if task == "scan":
        where = quarters(table)
        parts = ("upper", "lower left", "upper", "lower right")
        return [Split(task, *(where == part for part in parts))]
    if task != "organ":
        raise ValueError(f"unknown task {task!r}; valid are {', '.join(TASKS)}")
    folds = np.unique(table["fold"])
    shared = table.groupby("patient")["fold"].nunique().gt(1)
    if len(folds) < 3 or shared.any():
        raise ValueError(
            f"{len(folds)} folds, {int(shared.sum())} patients in more than one; "
            "expected three or more folds of whole patients: patches.assign_folds"
        )
    fold, found = table["fold"].to_numpy(), []
    for own, following in zip(folds, np.roll(folds, -1), strict=True):
        test, validation = fold == own, fold == following
        found.append(Split(task, ~test & ~validation, validation, ~test, test))
    return found


def published_split(table, validation=0.1, stratify=True, seed=0, task="scan") -> Split:
    """Take a published split (``split``: train or test); hold training patches back.

    Parameters
    ----------
    table : pandas.DataFrame
    validation : float
        Share of the training patches that validates, at random.
    stratify : bool
        The same share of each label; Yang et al. (2019) draw over all files.
    seed : int
    task : {"scan", "organ"}
        What `classes` are.
    """
    train = np.flatnonzero(table["split"].eq("train"))
    if not len(train) or not table["split"].isin(["train", "test"]).all():
        raise ValueError(
            f"split holds {', '.join(map(str, pd.unique(table['split'])))}; expected "
            "train and test: use a data set with a published split"
        )
    labels = table["label"].to_numpy()[train] if stratify else None
    _, held = train_test_split(
        train, test_size=validation, stratify=labels, random_state=seed
    )
    held = np.isin(np.arange(len(table)), held)
    train = table["split"].eq("train").to_numpy()
    return Split(task, train & ~held, held, train, ~train)


def quarters(table: pd.DataFrame) -> np.ndarray:
    """Return each patch's part of its slide: "upper", "lower left", "lower right"."""
    places = table.groupby("slide")[["x", "y"]]
    middle = (places.transform("min") + places.transform("max")) / 2
    right, lower = (table[axis] > middle[axis] for axis in ("x", "y"))
    return np.where(lower, np.where(right, "lower right", "lower left"), "upper")


def classes(table: pd.DataFrame, task: str) -> pd.Series:
    """Return the class of every patch under a task: its slide, or its label."""
    return table["slide"] if task == "scan" else table["label"]


def as_scans(embeddings: Embeddings) -> Embeddings:
    """Let the slide be the label."""
    table = embeddings.table
    return Embeddings(embeddings.vectors, table.assign(label=table["slide"]))


def evaluate(
    embeddings, splits, part="test", exclude=None, k=1, **archive
) -> pd.DataFrame:
    """Outcomes of the test (or validation) patches of one task, in table order.

    Parameters
    ----------
    embeddings : Embeddings, or list of Embeddings
        Of the whole table that was split; a list has those of one network per split.
    splits : Split, or list of Split
    part : {"test", "validation"}
        Test patches search the gallery, validation patches the training patches.
    exclude : {"touching"}, optional
        Gallery patches that touch the query may not be found.
    k : int
        Neighbours kept; ``query`` and ``neighbours`` are rows of the table.
    **archive
        ``standardised``, and options of `search.Archive`; default: cosine.
    """
    splits = [splits] if isinstance(splits, Split) else splits
    several = embeddings if isinstance(embeddings, list) else [embeddings] * len(splits)
    parts = []
    for made, split in zip(several, splits, strict=True):
        queries, gallery = split.test, split.gallery
        if part == "validation":
            queries, gallery = split.validation, split.train
        scans = split.task == "scan"
        unknown = "patient" in made.table and made.table["patient"].isna().all()
        made = as_scans(made) if scans else made
        found = train_gallery(
            made.take(queries), made.take(gallery), k, exclude,
            allow_shared_patients=scans or unknown, **archive,
        )  # fmt: skip
        parts.append(_renumbered(found, queries, gallery))
    return pd.concat(parts).sort_values("query", ignore_index=True)


def bench(embeddings: Embeddings, k: int = 1, **archive) -> pd.DataFrame:
    """Outcomes under every protocol of the bench, named in the column ``protocol``.

    ``scan_leave_one_out``, ``scan_not_touching``; ``scan_validation`` (lower left
    quarter against the upper half), ``scan_split`` (lower right quarter against the
    upper half), ``scan_split_not_touching``; ``organ`` (label, each patient fold
    against the others). Parameters are those of `leave_one_out`.
    """
    scans, (split,) = as_scans(embeddings), splits(embeddings.table, "scan")
    how = {"k": k, **archive}
    found = {
        "scan_leave_one_out": leave_one_out(scans, **how),
        "scan_not_touching": leave_one_out(scans, exclude="touching", **how),
        "scan_validation": evaluate(embeddings, split, "validation", **how),
        "scan_split": evaluate(embeddings, split, **how),
        "scan_split_not_touching": evaluate(
            embeddings, split, exclude="touching", **how
        ),
        "organ": patient_folds(embeddings, **how),
    }
    return pd.concat(
        [outcomes.assign(protocol=name) for name, outcomes in found.items()],
        ignore_index=True,
    )


def leave_one_out(
    embeddings, k=10, exclude="self", standardised=False, **archive
) -> pd.DataFrame:
    """Search every patch among the others.

    Parameters
    ----------
    embeddings : Embeddings
    k : int
        Neighbours kept for each query.
    exclude : {"self", "touching", "slide", "patient"}
        What a query may not find (`search.Archive.search`).
    standardised : bool
        Scale each dimension by the gallery's mean and deviation first; image statistics
        need it (with ``metric="euclidean"``).
    **archive
        Options of `search.Archive`: ``index``, ``metric``, ``rerank``.

    Raises
    ------
    ValueError
        As the search does; and for a class in which some query is alone.
    """
    if exclude is None:
        raise ValueError(
            "exclude=None would let every patch find itself; expected 'self', "
            "'touching', 'slide' or 'patient'"
        )
    space = standardise(embeddings) if standardised else embeddings
    return _retrieve(space, space, k, exclude, archive)


def leave_one_patient_out(embeddings, k=10, standardised=False, **archive):
    """Search every patch among the other patients' patches; as `leave_one_out`."""
    return leave_one_out(embeddings, k, "patient", standardised, **archive)


def train_gallery(
    queries, gallery, k=10, exclude=None, allow_shared_patients=False,
    standardised=False, **archive,
) -> pd.DataFrame:  # fmt: skip
    """Search test patches in a gallery of training patches.

    Parameters
    ----------
    queries, gallery : Embeddings
    k, exclude, standardised, **archive
        As in `leave_one_out`; nothing is excluded by default, the scale is the
        gallery's.
    allow_shared_patients : bool
        Where the class *is* the scan (Path24, scan recognition on MoNuSeg), queries and
        gallery share patients by design: say so here.

    Raises
    ------
    ValueError
        A patient in both without ``allow_shared_patients``; a query whose class is not
        in the gallery; and as the search does.
    """
    if not allow_shared_patients:
        _check_disjoint(queries.table, gallery.table)
    if standardised:
        gallery, queries = standardise(gallery, queries)
    return _retrieve(queries, gallery, k, exclude, archive)


def patient_folds(
    embeddings, k=10, fold="fold", standardised=False, **archive
) -> pd.DataFrame:
    """Search each fold of patients (column ``fold``) in the other folds.

    A system trained anew for each fold gives a list of Embeddings, in the order of the
    folds' values. Parameters are those of `leave_one_out`; a patient in two folds is an
    error.
    """
    each = embeddings if isinstance(embeddings, list) else None
    table = (each[0] if each else embeddings).table
    check_columns(table, [fold, "patient"])
    several = table.groupby("patient")[fold].nunique()
    if (several > 1).any():
        raise ValueError(
            f"patient {_first(several.index[several > 1])} is in {several.max()} "
            f"values of {fold!r} ({int((several > 1).sum())} such patients); every "
            "patient belongs to one: assign folds by patient"
        )
    values = sorted(table[fold].unique())
    each = each or [embeddings] * len(values)
    if len(values) < 2 or len(each) != len(values):
        raise ValueError(
            f"column {fold!r} has {len(values)} folds, for {len(each)} Embeddings; "
            "expected two folds or more, and one Embeddings for each or for all"
        )
    where = table[fold].to_numpy()
    masks = [(where == value, where != value) for value in values]
    parts = [Split("organ", others, own, others, own) for own, others in masks]
    return evaluate(each, parts, k=k, standardised=standardised, **archive)


def linear_probe(
    train, test, c_values=C_VALUES, groups="patient", allow_shared_patients=False,
    n_splits=5, seed=0,
) -> pd.DataFrame:  # fmt: skip
    """Classify test patches by a linear SVM on standardised training vectors.

    C is chosen by cross-validation inside ``train``, groups kept whole (the smallest of
    equally good ones); it stands in ``outcomes.attrs["c"]``.

    Parameters
    ----------
    train, test : Embeddings
    c_values : sequence of float
    groups : str or (n,) array
        What inner folds may not divide: a column of the training table, or one value
        per row. Where the class is the scan, give places (rows or quarters) instead.
    allow_shared_patients : bool
        As in `train_gallery`.
    n_splits, seed : int
        Inner folds, fewer where there are fewer groups; also of the solver.

    Raises
    ------
    ValueError
        A patient in both parts, fewer than two groups or classes, groups that hold
        whole classes, or a test class that was not trained on.
    """
    if not allow_shared_patients:
        _check_disjoint(test.table, train.table)
    named = isinstance(groups, str)
    check_columns(train.table, ["label", groups] if named else ["label"])
    check_columns(test.table, ["label"])
    y = train.table["label"].to_numpy()
    group = train.table[groups].to_numpy() if named else np.asarray(groups)
    c_values = sorted(c_values)
    if len(group) != len(y) or not c_values:
        raise ValueError(
            f"{len(group)} groups for {len(y)} training patches and {len(c_values)} "
            "values of C; expected one group per patch and at least one C"
        )
    spread = pd.Series(group).groupby(y).nunique()
    if len(spread) < 2 or spread.max() < 2:
        raise ValueError(
            f"{len(spread)} classes in {len(np.unique(group))} groups, the widest "
            f"class in {spread.max()}; choosing C needs two classes, and classes that "
            "occur in two groups: give other groups="
        )
    unknown = set(test.table["label"]) - set(y)
    if unknown:
        raise ValueError(
            f"test class {_first(unknown)} is not in the training set "
            f"({len(unknown)} such); leave it out or train on it"
        )
    n_splits = min(n_splits, len(np.unique(group)), pd.Series(y).value_counts().max())
    folds = StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed)
    right = np.zeros(len(c_values))
    for fit, held in folds.split(train.vectors, y, group):
        if len(np.unique(y[fit])) < 2 or len(held) == 0:
            continue  # nothing to learn from one class, nothing to validate on
        for i, c in enumerate(c_values if len(c_values) > 1 else ()):
            machine = _svm(c, seed).fit(train.vectors[fit], y[fit])
            right[i] += (machine.predict(train.vectors[held]) == y[held]).sum()
    best = c_values[int(right.argmax())]
    predicted = _svm(best, seed).fit(train.vectors, y).predict(test.vectors)
    outcomes = _outcomes(test.table, predicted)
    outcomes.attrs["c"] = best
    return outcomes


def slide_bags(embeddings, barcode=False):
    """Gather patches into slides: a list of (n_i, d) arrays, and one row per slide.

    With ``barcode``, vectors become `search.minmax_barcode` bits. A slide with two
    labels or two patients is an error.
    """
    table = embeddings.table
    check_columns(table, ["slide", "label"])
    columns = [c for c in ("slide", "label", "patient") if c in table]
    for column in columns[1:]:
        several = table.groupby("slide")[column].nunique(dropna=False)
        if (several > 1).any():
            raise ValueError(
                f"slide {_first(several.index[several > 1])} has {several.max()} "
                f"values of {column!r}; expected one: correct the table"
            )
    features = minmax_barcode(embeddings.vectors) if barcode else embeddings.vectors
    groups = table.groupby("slide", sort=False).indices
    slides = table.drop_duplicates("slide")[columns].reset_index(drop=True)
    return [features[groups[slide]] for slide in slides["slide"]], slides


def slide_search(
    bags, table, k=3, exclude="patient", metric=None, reduce="median", shortlist=None
) -> pd.DataFrame:
    """Search every slide among the others by the distances of their patches.

    ``predicted`` is the majority of the k nearest slides; of equally frequent labels
    the one met first in distance order (Yottixel's rule). Equal distances: the slide
    that comes first in the table.

    Parameters
    ----------
    bags : list of (n_i, d) arrays
        Bits or float features of each slide's patches (`slide_bags`).
    table : DataFrame
        One row per slide: ``slide``, ``label``; ``patient`` to exclude by patient.
    k : int
    exclude : {"slide", "patient"}
        Yottixel leaves out the query slide only.
    metric, reduce
        Of `search.bag_distances`; by default the median of the minimum distances.
    shortlist : outcomes, optional
        Of an earlier search of the same slides, by barcodes say: each query is compared
        with the neighbours found there alone.

    Raises
    ------
    ValueError
        As `leave_one_out`; slides and rows of different number; a shortlist of other
        slides, shorter than k, or with slides that ``exclude`` forbids.
    """
    if exclude not in ("slide", "patient") or len(bags) != len(table):
        raise ValueError(
            f"exclude={exclude!r} for {len(bags)} slides and a table of {len(table)}; "
            "expected 'slide' or 'patient', and one row per slide"
        )
    table = table.reset_index(drop=True)
    check_k(k, table, table, exclude)
    relevant = _relevant(table, table, exclude)
    forbidden = exclusion_mask(table, table, exclude)
    listed = None
    if shortlist is not None:
        listed = _listed(shortlist, len(bags), k, forbidden, exclude)
    distances = bag_distances(bags, None, metric, reduce, listed)
    distances[forbidden] = np.inf
    ids = np.argsort(distances, axis=1, kind="stable")[:, :k]
    labels = table["label"].to_numpy()[ids]
    votes = [Counter(row.tolist()).most_common(1)[0][0] for row in labels]
    near = np.take_along_axis(distances, ids, axis=1)
    return _outcomes(table, votes, ids, labels, near, relevant)


def vertical_search(bags, table, within, k=3, **how) -> pd.DataFrame:
    """Search every slide among those with its value of a column (KimiaNet)."""
    check_columns(table, [within])
    parts = []
    for value, rows in table.groupby(within).indices.items():
        try:
            part = slide_search([bags[i] for i in rows], table.iloc[rows], k, **how)
        except ValueError as error:
            raise ValueError(f"within {within} {str(value)!r}: {error}") from error
        mask = np.isin(np.arange(len(table)), rows)
        parts.append(_renumbered(part, mask, mask))
    return pd.concat(parts).sort_values("query", ignore_index=True)


def _listed(shortlist, n, k, forbidden, exclude):
    """Return the slides that an earlier search found for each query, (n, m)."""
    if len(shortlist) != n or shortlist["query"].tolist() != list(range(n)):
        raise ValueError(
            f"the shortlist has {len(shortlist)} queries for {n} slides; expected "
            "outcomes of slide_search of the same slides"
        )
    listed = np.stack(shortlist["neighbours"])
    if listed.shape[1] < k:
        raise ValueError(
            f"k={k} of a shortlist of {listed.shape[1]}; search the shortlist with a "
            "larger k"
        )
    if np.take_along_axis(forbidden, listed, axis=1).any():
        raise ValueError(
            f"the shortlist holds slides that exclude={exclude!r} forbids; search it "
            "with the same exclude"
        )
    return listed


def _renumbered(outcomes, queries, gallery):
    """Let queries and neighbours be rows of the table that both were taken from."""
    rows = np.flatnonzero(gallery)
    near = [rows[ids] for ids in outcomes["neighbours"]]
    return outcomes.assign(query=np.flatnonzero(queries), neighbours=near)


def _retrieve(queries, gallery, k, exclude, archive):
    check_columns(queries.table, ["label"])
    check_columns(gallery.table, ["label"])
    check_k(k, queries.table, gallery.table, exclude)
    relevant = _relevant(queries.table, gallery.table, exclude)
    ids, distances = Archive(gallery, **archive).search(queries, k, exclude)
    labels = gallery.table["label"].to_numpy()[ids]
    return _outcomes(queries.table, labels[:, 0], ids, labels, distances, relevant)


def _relevant(queries, gallery, exclude):
    relevant = count_relevant(queries, gallery, exclude)
    if (relevant == 0).any():
        query = int((relevant == 0).argmax())
        raise ValueError(
            f"class {str(queries['label'].iloc[query])!r}: query {query} is alone in "
            f"it, nothing of its class is left under exclude={exclude!r}; leave "
            "such classes out, or exclude less"
        )
    return relevant


def _outcomes(
    table, predicted, ids=None, labels=None, distances=None, relevant=None
) -> pd.DataFrame:
    def known(name):
        return table[name].to_numpy() if name in table else None

    found = {"neighbours": ids, "neighbour_labels": labels, "distances": distances}
    columns = {
        "query": np.arange(len(table)),
        "label": table["label"].to_numpy(),
        "predicted": predicted,
        "patient": known("patient"),
        "slide": known("slide"),
        **{name: None if rows is None else list(rows) for name, rows in found.items()},
        "relevant": relevant,
    }
    return pd.DataFrame(columns, index=range(len(table)))


def _check_disjoint(queries, gallery):
    for table in (queries, gallery):
        check_columns(table, ["patient"], remedy=" (or allow_shared_patients=True)")
    shared = set(queries["patient"]) & set(gallery["patient"])
    if shared:
        raise ValueError(
            f"patient {_first(shared)} is in both queries and gallery "
            f"({len(shared)} such patients); split by patient, or say "
            "allow_shared_patients=True where the task shares them by design"
        )


def _first(values):
    return repr(min(map(str, values)))


def _svm(c, seed):
    return make_pipeline(
        StandardScaler(), LinearSVC(C=c, random_state=seed, max_iter=10_000)
    )
