"""Rules of failure on eight patches worked by hand."""

import numpy as np
import pandas as pd
import pytest

from histo_utils import confounders

TABLE = pd.DataFrame(
    {
        "label": list("abcabcab"),
        "slide": list("stuvwxyz"),
        "preparation": ["P", "P", "F", "F", "P", "F", "P", "F"],
        "fold": [0, 0, 0, 1, 1, 1, 2, 2],
    }
)


def outcomes(neighbours):
    """Outcomes of the first rows, from the rows they found."""
    label = TABLE["label"].to_numpy()
    near = np.array(neighbours)
    return pd.DataFrame(
        {
            "query": range(len(near)),
            "label": label[: len(near)],
            "predicted": label[near[:, 0]],
            "patient": TABLE["slide"][: len(near)],
            "neighbours": list(near),
            "neighbour_labels": list(label[near]),
        }
    )


def test_rules_by_hand():
    # 0 (a, P) finds 4 (b, P): same preparation, a exists as F; histogram on 4's slide
    # 1 (b, P) finds 4 (b): right.  2 (c, F) finds 7 (b, F): the only c is F, too
    found = confounders.causes(
        outcomes([[4, 5, 3], [4, 3, 5], [7, 5, 6]]),
        outcomes([[4, 3, 5], [6, 3, 5], [3, 4, 5]]),
        TABLE,
        related=[("b", "c")],
        k=3,
    )
    assert found["query"].tolist() == [0, 2]
    assert found["colour"].tolist() == [True, False]
    assert found["preparation"].tolist() == [True, False]
    assert found["related"].tolist() == [False, True]
    # 0: one a, one b among three; 2: one c, one b among three
    assert found["ambiguous"].tolist() == [True, True]
    assert found["none"].tolist() == [False, False]
    # query 0 might have found b, c, b of rows 4, 5, 7: rule colour holds for row 4,
    # preparation for row 4; query 2 might have found a, b, a, b of 3, 4, 6, 7
    assert found["chance_colour"].tolist() == pytest.approx([1 / 3, 1 / 4])
    assert found["chance_preparation"].tolist() == pytest.approx([1 / 3, 0])
    assert found["chance_related"].tolist() == pytest.approx([0, 2 / 4])


def test_a_mistake_may_fit_no_rule():
    found = confounders.causes(
        outcomes([[7, 5, 4]]), outcomes([[4, 3, 5]]), TABLE, k=3
    )  # 0 (a, P) finds 7 (b, F), no other a near
    assert found["none"].tolist() == [True]
    assert not found[["colour", "preparation", "related", "ambiguous"]].any(axis=None)


def test_other_queries_are_refused():
    with pytest.raises(ValueError, match="different queries"):
        confounders.causes(outcomes([[4], [4]]), outcomes([[4]]), TABLE)
