"""Metric losses that pytorch-metric-learning lacks in this form (Yang et al. 2019).

All take unit vectors and labels and are dense: every pair of the batch is looked at,
the pair of an item with itself left out by its index. (The released code leaves it out
by ``similarity < 1``; floating point then keeps some self-pairs and drops true
duplicates.) Where no anchor of the batch counts, the loss is 0 with a gradient of 0, so
that a training step does no harm. Half precision is computed in float32.

References
----------
Yang et al., Liver histopathological image retrieval based on deep metric learning,
BIBM 2019; steps as in easonyang1996/DML_HistoImgRetrieval, commit 9b01805.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import nn


class MultiSimilarityLoss(nn.Module):
    """Multi-similarity loss as modified by Yang et al. (2019).

    With cosine similarities s of anchor i to its positives P and negatives N, mined
    N' = {n: s_n + ε > min_P s} and P' = {p: s_p - ε < max_N s},

    ℓ_i = ln(1 + Σ_P' exp(-α(s - λ))) / α + ln(1 + Σ_N' exp(β(s - λ))) / β,

    averaged over the anchors for which P, N, P' and N' all hold something.
    pytorch-metric-learning's loss and miner average over all anchors instead, and the
    original of CVPR 2019 has β = 50 and ε = 0.1.

    Parameters
    ----------
    alpha, beta : float
        Steepness for positives and negatives.
    base : float
        λ, the similarity about which pairs are weighed.
    epsilon : float
        Margin of the mining.
    """

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
        counts = hard_positive.any(1) & hard_negative.any(1)
        pull = _log_one_plus_sum_exp(-self.alpha * (s - self.base), hard_positive)
        push = _log_one_plus_sum_exp(self.beta * (s - self.base), hard_negative)
        # 0 times the sum: a NaN, which no mask would take up, is not hidden
        return _mean_over(pull / self.alpha + push / self.beta, counts) + 0 * s.sum()


class ContrastiveLoss(nn.Module):
    """Contrastive loss in the released code's "new" form (Yang et al. 2019).

    ℓ_i = mean_N max(0, s - margin) - mean_P s, over the anchors that have positives and
    negatives. It can be negative: -1 where all positives coincide.

    Parameters
    ----------
    margin : float
        Similarity up to which negatives cost nothing.
    """

    def __init__(self, margin=0.5):
        super().__init__()
        self.margin = margin

    def forward(self, embeddings, labels):
        """Return the loss of unit rows (n, d) with labels (n,); a scalar."""
        s, positive, negative = _pairs(embeddings, labels)
        push = _row_means((s - self.margin).clamp(min=0), negative)
        pull = _row_means(s, positive)
        return _mean_over(push - pull, positive.any(1) & negative.any(1))


class ABELoss(nn.Module):
    """Loss of an attention-based ensemble of learners (ABE-M in Yang et al. 2019).

    For each learner ℓ_i = mean_P max(0, margin - s) + mean_N s, averaged over anchors
    and learners, plus ``lambda_div`` times the divergence: over pairs of learners and
    items, the mean of max(0, x_a · x_b - margin_div), which keeps learners apart.

    Parameters
    ----------
    lambda_div, margin, margin_div : float
    """

    def __init__(self, lambda_div=0.05, margin=0.5, margin_div=0.2):
        super().__init__()
        self.lambda_div, self.margin, self.margin_div = lambda_div, margin, margin_div

    def forward(self, embeddings, labels):
        """Return the loss of a list of two learners' unit rows (n, d) or more."""
        one = torch.is_tensor(embeddings) and embeddings.ndim != 3
        if one or len(embeddings) < 2:
            raise ValueError(
                "ABELoss takes a list of embeddings, one (n, d) a learner, and two or "
                "more of them; for a single learner use ContrastiveLoss"
            )
        learners = [_full(x) for x in embeddings]
        contrast = torch.stack([self._contrast(x, labels) for x in learners]).mean()
        apart = [
            ((a * b).sum(1) - self.margin_div).clamp(min=0).mean()
            for a, b in combinations(learners, 2)
        ]
        return contrast + self.lambda_div * torch.stack(apart).mean()

    def _contrast(self, x, labels):
        s, positive, negative = _pairs(x, labels)
        pull = _row_means((self.margin - s).clamp(min=0), positive)
        push = _row_means(s, negative)
        return _mean_over(pull + push, positive.any(1) & negative.any(1))


def _pairs(embeddings, labels):
    """Similarities (n, n) and which pairs are positive, which negative."""
    x = _full(embeddings)
    if x.ndim != 2 or len(x) != len(labels):
        raise ValueError(
            f"embeddings of shape {tuple(x.shape)} with {len(labels)} labels; expected "
            "(n, d) and n"
        )
    labels = torch.as_tensor(labels, device=x.device)
    same = labels[:, None] == labels[None]
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return x @ x.T, same & ~itself, ~same


def _full(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _log_one_plus_sum_exp(values, mask):
    """ln(1 + Σ exp(values)) over the masked entries of each row, without overflow."""
    zero = torch.zeros_like(values[:, :1])
    kept = values.masked_fill(~mask, -torch.inf)
    return torch.logsumexp(torch.cat([zero, kept], 1), 1)


def _row_means(values, mask):
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _mean_over(values, counts):
    """Mean of the anchors that count; 0 with a gradient if none does."""
    return (values * counts).sum() / counts.sum().clamp(min=1)
