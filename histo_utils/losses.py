"""Metric losses that pytorch-metric-learning lacks in this form (Yang et al. 2019).

All are dense: every pair of the batch is looked at, the pair of an item with itself
left out by its index. (The released code, easonyang1996/DML_HistoImgRetrieval at commit
9b01805, leaves it out by ``similarity < 1``; floating point then keeps some self-pairs
and drops true duplicates.) Where no anchor of the batch counts, the loss is 0 with a
gradient of 0. Half precision is computed in float32. ``pairwise`` says that a loss sees
the pairs of one batch, so that `training.fit` refuses to accumulate its batches.
"""

from itertools import combinations

import torch
from torch import nn


class MultiSimilarityLoss(nn.Module):
    """Multi-similarity loss as modified by Yang et al. (2019).

    With cosine similarities s of anchor i to its positives P and negatives N, mined
    N' = {n: s_n + ε > min_P s} and P' = {p: s_p - ε < max_N s},

    ℓ_i = ln(1 + Σ_P' exp(-α(s - λ))) / α + ln(1 + Σ_N' exp(β(s - λ))) / β,

    averaged over the anchors for which none of the four is empty (over all anchors in
    pytorch-metric-learning). The original of CVPR 2019 has β = 50 and ε = 0.1.

    Parameters
    ----------
    alpha, beta, base, epsilon : float
        α and β (steepness), λ, and the margin ε of the mining.
    """

    pairwise = True

    def __init__(self, alpha=2.0, beta=5.0, base=0.5, epsilon=0.2):
        super().__init__()
        self.alpha, self.beta, self.base, self.epsilon = alpha, beta, base, epsilon

    def forward(self, embeddings, labels):
        """Return the loss of unit rows (n, d) with labels (n,); a scalar."""
        s, positive, negative = _pairs(embeddings, labels)
        farthest = s.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
        nearest = s.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
        hard_positive = positive & (s - self.epsilon < nearest)
        hard_negative = negative & (s + self.epsilon > farthest)
        pull = _log_one_plus_sum_exp(-self.alpha * (s - self.base), hard_positive)
        push = _log_one_plus_sum_exp(self.beta * (s - self.base), hard_negative)
        counts = hard_positive.any(1) & hard_negative.any(1)
        # 0 times the sum: a NaN, which no mask would take up, is not hidden
        return _mean(pull / self.alpha + push / self.beta, counts) + 0 * s.sum()


class ContrastiveLoss(nn.Module):
    """Contrastive loss in the released code's "new" form (Yang et al. 2019).

    ℓ_i = mean_N max(0, s - margin) - mean_P s, over the anchors that have positives and
    negatives; -1 where all positives coincide.

    Parameters
    ----------
    margin : float
    """

    pairwise = True

    def __init__(self, margin=0.5):
        super().__init__()
        self.margin = margin

    def forward(self, embeddings, labels):
        """Return the loss of unit rows (n, d) with labels (n,); a scalar."""
        s, positive, negative = _pairs(embeddings, labels)
        return _contrast(-s, positive, (s - self.margin).clamp(min=0), negative)


class ABELoss(nn.Module):
    """Loss of an attention-based ensemble of learners (ABE-M in Yang et al. 2019).

    For each learner ℓ_i = mean_P max(0, margin - s) + mean_N s, averaged over anchors
    and learners, plus ``lambda_div`` times the divergence: over pairs of learners and
    items, the mean of max(0, x_a · x_b - margin_div), which keeps learners apart.

    Parameters
    ----------
    lambda_div, margin, margin_div : float
    """

    pairwise = True

    def __init__(self, lambda_div=0.05, margin=0.5, margin_div=0.2):
        super().__init__()
        self.lambda_div, self.margin, self.margin_div = lambda_div, margin, margin_div

    def forward(self, embeddings, labels):
        """Return the loss of a list of two learners' unit rows (n, d) or more."""
        one = torch.is_tensor(embeddings) and embeddings.ndim != 3
        if one or len(embeddings) < 2:
            raise ValueError(
                "ABELoss takes a list of embeddings, one (n, d) for each of two "
                "learners or more; for a single learner use ContrastiveLoss"
            )
        learners, margin = [_full(x) for x in embeddings], self.margin_div
        pairs = [_pairs(x, labels) for x in learners]
        each = [_contrast((self.margin - s).clamp(min=0), p, s, n) for s, p, n in pairs]
        apart = [
            ((a * b).sum(1) - margin).clamp(min=0).mean()
            for a, b in combinations(learners, 2)
        ]
        return torch.stack(each).mean() + self.lambda_div * torch.stack(apart).mean()


def _pairs(embeddings, labels):
    """Similarities (n, n) and which pairs are positive, which negative."""
    x = _full(embeddings)
    if x.ndim != 2 or len(x) != len(labels):
        given = f"embeddings of shape {tuple(x.shape)} with {len(labels)} labels"
        raise ValueError(f"{given}; expected (n, d) and n")
    labels = torch.as_tensor(labels, device=x.device)
    same = labels[:, None] == labels[None]
    return x @ x.T, same & ~torch.eye(len(x), dtype=bool, device=x.device), ~same


def _full(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _contrast(pull, positive, push, negative):
    values = _mean(pull, positive, 1) + _mean(push, negative, 1)
    return _mean(values, positive.any(1) & negative.any(1))


def _log_one_plus_sum_exp(values, mask):
    """ln(1 + Σ exp(values)) over the masked entries of each row, without overflow."""
    kept = values.masked_fill(~mask, -torch.inf)
    return torch.logsumexp(nn.functional.pad(kept, (1, 0)), 1)


def _mean(values, mask, dim=None):
    """Mean of the masked values; 0 with a gradient of 0 if there are none."""
    return (values * mask).sum(dim) / mask.sum(dim).clamp(min=1)
