"""The losses of Yang 2019 against golden values, loops and the library's version."""

import json

import numpy as np
import pytest
import torch

from histo_utils.losses import ABELoss, ContrastiveLoss, MultiSimilarityLoss

CASES = ("A_mixed", "B_easy", "C_hard", "D_hand")


@pytest.fixture(scope="module")
def known(golden):
    arrays = np.load(golden / "dml_losses.npz")
    return arrays, json.loads((golden / "dml_losses.json").read_text())


def unit_rows(rng, n, d, dtype=torch.float64):
    x = torch.tensor(rng.standard_normal((n, d)), dtype=dtype)
    return torch.nn.functional.normalize(x, dim=1)


def slow_multi_similarity(x, y, alpha=2.0, beta=5.0, base=0.5, epsilon=0.2):
    s, losses = x @ x.T, []
    for i in range(len(x)):
        positive = [s[i, j] for j in range(len(x)) if y[j] == y[i] and j != i]
        negative = [s[i, j] for j in range(len(x)) if y[j] != y[i]]
        if not positive or not negative:
            continue
        hard_p = [v for v in positive if v - epsilon < max(negative)]
        hard_n = [v for v in negative if v + epsilon > min(positive)]
        if hard_p and hard_n:
            pull = np.log1p(sum(np.exp(-alpha * (v - base)) for v in hard_p)) / alpha
            push = np.log1p(sum(np.exp(beta * (v - base)) for v in hard_n)) / beta
            losses.append(pull + push)
    return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("case", CASES)
def test_golden_values(known, case):
    arrays, expected = known
    x, y = torch.tensor(arrays[f"{case}_x"]), torch.tensor(arrays[f"{case}_y"])
    found = MultiSimilarityLoss()(x, y).item()
    assert found == pytest.approx(expected[case]["ms_exact_float64"], abs=1e-9)
    found = ContrastiveLoss()(x, y).item()
    assert found == pytest.approx(expected[case]["contrastive_new_exact"], abs=1e-9)


def test_golden_ensemble(known):
    arrays, expected = known
    x, y = [torch.tensor(v) for v in arrays["ABE_x"]], torch.tensor(arrays["ABE_y"])
    exact = expected["ABE"]
    assert ABELoss()(x, y).item() == pytest.approx(exact["total_exact"], abs=1e-9)
    alone = ABELoss(lambda_div=0.0)(x, y).item()
    assert alone == pytest.approx(exact["contrastive_exact"], abs=1e-9)


def test_the_ensemble_s_loss_of_joined_learners_is_that_of_their_list(known):
    """Value and gradient; as `Joined` puts them side by side."""
    arrays, _ = known
    x, y = torch.tensor(arrays["ABE_x"]), torch.tensor(arrays["ABE_y"])
    lists, joined = x.clone().requires_grad_(), x.clone().requires_grad_()
    rows = torch.nn.functional.normalize(torch.cat(list(joined), 1), dim=1)
    values = ABELoss()(list(lists), y), ABELoss(learners=len(x))(rows, y)
    assert values[0].item() == pytest.approx(values[1].item(), abs=1e-12)
    for value in values:
        value.backward()
    along = (lists.grad * x).sum(2, keepdim=True) * x  # joining takes length away
    assert torch.allclose(lists.grad - along, joined.grad, atol=1e-12)


def test_golden_gradient(known):
    arrays, _ = known
    x = torch.tensor(arrays["A_mixed_x"], requires_grad=True)
    MultiSimilarityLoss()(x, torch.tensor(arrays["A_mixed_y"])).backward()
    expected = arrays["A_mixed_ms_grad_original_float64"]
    assert np.allclose(x.grad.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_multi_similarity_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    x, y = unit_rows(rng, 20, 4), rng.integers(0, 5, 20)
    expected = slow_multi_similarity(x.numpy(), y)
    found = MultiSimilarityLoss()(x, torch.tensor(y)).item()
    assert found == pytest.approx(expected, abs=1e-12)


each_loss = pytest.mark.parametrize("loss", [MultiSimilarityLoss(), ContrastiveLoss()])


@each_loss
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_without_valid_anchors_it_is_zero_with_a_gradient(loss, labels):
    x = unit_rows(np.random.default_rng(0), 4, 3).requires_grad_()
    value = loss(x, torch.tensor(labels))
    value.backward()
    assert value.item() == 0 and torch.equal(x.grad, torch.zeros_like(x))


@each_loss
def test_the_order_of_the_batch_does_not_matter(loss):
    rng = np.random.default_rng(1)
    x, y = unit_rows(rng, 12, 5), torch.tensor(rng.integers(0, 3, 12))
    turn = torch.tensor(rng.permutation(12))
    assert torch.allclose(loss(x, y), loss(x[turn], y[turn]), atol=1e-12)


def test_true_duplicates_count_as_positives():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # anchors 0 and 1: no negative beyond the margin, their positive at similarity 1
    assert ContrastiveLoss()(x, torch.tensor([0, 0, 1])).item() == -1.0


def test_half_precision_is_computed_in_full(known):
    arrays, expected = known
    x, y = torch.tensor(arrays["C_hard_x"]), torch.tensor(arrays["C_hard_y"])
    value = MultiSimilarityLoss()(x.to(torch.bfloat16), y)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(
        expected["C_hard"]["ms_exact_float64"], abs=0.05
    )


def test_bad_input_is_named():
    x = torch.eye(4)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) with 3 labels"):
        MultiSimilarityLoss()(x, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="list of embeddings"):
        ABELoss()(x, torch.tensor([0, 0, 1, 1]))


@each_loss
def test_nan_is_not_hidden(loss):
    x = torch.nn.functional.normalize(torch.arange(24.0).view(8, 3) % 7 + 1)
    x[2] = torch.nan
    assert torch.isnan(loss(x, torch.arange(8) % 2))
