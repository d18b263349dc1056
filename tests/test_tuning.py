"""Runs on a split: who trains, what judges; the encoder changes with its part."""

import numpy as np
import pandas as pd
import pytest
import torch

from histo_utils import catalog, encoders, trials, tuning
from histo_utils.losses import MultiSimilarityLoss
from histo_utils.networks.stages import cut


def test_a_share_is_of_each_class_and_two_at_least():
    labels = np.repeat(["a", "b", "c"], [8, 4, 3])
    train = np.ones(15, bool)
    train[0] = False  # seven of a train
    half = tuning.share_of(labels, train, 0.5, seed=3)
    assert pd.Series(labels[half]).value_counts().to_dict() == {"a": 4, "b": 2, "c": 2}
    quarter = tuning.share_of(labels, train, 0.25, seed=3)
    assert set(quarter) < set(half), "smaller shares are parts of larger ones"
    assert tuning.share_of(labels, train, 1.0).tolist() == list(range(1, 15))
    with pytest.raises(ValueError, match="share=0; expected more than 0"):
        tuning.share_of(labels, train, 0)


def test_published_split_holds_a_tenth_back():
    table = pd.DataFrame({"split": ["train"] * 20 + ["test"] * 5})
    split = tuning.given_split(table)
    assert (split.choose.sum(), split.train.sum(), split.test.sum()) == (2, 18, 5)
    assert not (split.choose & split.train).any()
    assert (split.gallery == (split.choose | split.train)).all()
    assert not (split.gallery & split.test).any()


def test_only_classes_that_train_can_choose():
    table = pd.DataFrame({"label": ["a", "b", "a", "b"], "slide": list("wxyz")})
    train, choose = np.array([1, 0, 0, 0], bool), np.array([0, 1, 1, 0], bool)
    split = trials.Split("organ", train, choose, train | choose, ~(train | choose))
    (found,) = tuning.choosable(table, [split])
    assert found.choose.tolist() == [False, False, True, False]
    assert tuning.sizes({"organ": [found]}) == {
        "organ 0": {"train": 1, "choose": 1, "gallery": 3, "test": 1}
    }


def test_optimisers_are_named_in_text():
    weights = [torch.zeros(2, requires_grad=True)]
    made = tuning.optimiser("sgd 0.01", weights).param_groups[0]
    assert (made["lr"], made["momentum"], made["weight_decay"]) == (0.01, 0.9, 0)
    for wrong in ("sgd", "lion 0.1"):
        with pytest.raises(ValueError, match="expected one of sgd, adam and a"):
            tuning.optimiser(wrong, weights)


@pytest.fixture(scope="module")
def made(phantoms):
    folder, _ = phantoms
    table = catalog.patch_table(str(folder), 256, 0.5)
    table = table[table.groupby("slide").cumcount() % 4 == 0].reset_index(drop=True)
    body = encoders.frozen("mobilenetv2_035", seed=0, size=32)
    front, _ = cut(body.network.network, 6)
    views = encoders.stored(body, front, table, progress=False)
    return tuning.Bench(table, views), body


def one_run(made, folder, judge="p_at_1", how="sgd 0.01"):
    of, _ = made
    body = encoders.frozen("mobilenetv2_035", seed=0, size=32)
    encoder = encoders.projected(body, 8, seed=1)
    part = tuning.behind(encoder, 6)
    (split,) = trials.splits(of.table, "scan")
    settings = {"judge": judge, "how": how}
    run = tuning.train(
        encoder, part, split, MultiSimilarityLoss(), how, of, batch_size=8,
        per_class=2, steps=2, epochs=2, judge=judge, settings=settings, folder=folder,
    )  # fmt: skip
    return encoder, run


def test_training_the_part_trains_the_encoder(made, tmp_path):
    of, _ = made
    encoder, run = one_run(made, tmp_path)
    every = np.arange(len(of.table))
    through_part = tuning.described(encoder, run.network, of, every).vectors
    whole = encoders.embed(encoder, of.table, progress=False).vectors
    np.testing.assert_allclose(through_part, whole, atol=1e-4)
    fresh = tuning.behind(encoders.projected(made[1], 8, seed=1), 6)
    before = tuning.described(encoder, fresh, of, every < 5).vectors
    assert np.abs(before[:5] - whole[:5]).max() > 1e-4, "nothing was learned"
    assert not before[5:].any(), "rows that were not asked for stay zero"
    assert run.history["images"].tolist() == [16, 16]


def test_the_loss_judges_by_choosing_patches_alone(made, tmp_path):
    of, _ = made
    encoder, run = one_run(made, tmp_path, "loss")
    (split,) = trials.splits(of.table, "scan")
    rows = np.flatnonzero(split.choose)
    vectors = tuning.described(encoder, run.network, of, rows).vectors
    mixed = np.random.default_rng(0).permutation(rows)
    labels = torch.from_numpy(pd.factorize(of.table["slide"])[0])
    values = [
        float(MultiSimilarityLoss()(torch.from_numpy(vectors[g]), labels[g]))
        for g in np.array_split(mixed, max(1, len(rows) // 8))
    ]
    assert run.history["score"].max() == pytest.approx(-np.mean(values), abs=1e-5)
    with pytest.raises(ValueError, match="unknown judge 'luck'; valid are p_at_1"):
        one_run(made, tmp_path, "luck")
