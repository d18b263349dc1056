"""A pretrained body with a new head, trained in two steps (after Li et al. 2022).

Step 1 trains the head on a body that stays bit by bit as it was; step 2 trains both.
Width, dropout and modes are the book's: the paper's abstract names none.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import nn


def with_head(body, dimension, n_classes, hidden=256, dropout=0.5, seed=0):
    """Put Dense, ReLU, Dropout, Dense on a body that gives pooled features.

    Parameters
    ----------
    body : torch.nn.Module
        Anything in, (b, dimension) out; shared, not copied.
    dimension, n_classes, hidden : int
    dropout : float
    seed : int
        Of the head's weights; torch's own generator stays as it was.

    Returns
    -------
    torch.nn.Sequential
        ``body`` and ``head``.

    Examples
    --------
    >>> net = with_head(nn.Flatten(), 6, n_classes=3, hidden=4)
    >>> sum(p.numel() for p in net.parameters()) == 6 * 4 + 4 + 4 * 3 + 3
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Linear(dimension, hidden), nn.Linear(hidden, n_classes)
    head = nn.Sequential(first, nn.ReLU(), nn.Dropout(dropout), last)
    return nn.Sequential(OrderedDict(body=body, head=head))


def set_step(net, number) -> list:
    """Prepare a network for step 1 (the head) or 2 (everything).

    All parts but dropout are in evaluation mode in both: in training mode a batch norm
    would change its running means without any gradient.

    Parameters
    ----------
    net : torch.nn.Sequential
        From `with_head`.
    number : {1, 2}

    Returns
    -------
    list of torch.nn.Parameter
        Those to train.

    Raises
    ------
    ValueError
        Another number.
    """
    if number not in (1, 2):
        raise ValueError(f"step {number}; there are steps 1 (head) and 2 (everything)")
    for part in net.modules():
        part.training = isinstance(part, nn.Dropout)
    net.head.requires_grad_(True)
    net.body.requires_grad_(number == 2)
    return [p for p in net.parameters() if p.requires_grad]


def digest(module) -> str:
    """Hash of all weights and buffers, names included."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def answers(head, vectors):
    """Class number that a head's softmax is highest for; (n,) int array.

    Parameters
    ----------
    head : torch.nn.Module
        In evaluation mode.
    vectors : (n, d) array
        Pooled features.
    """
    device = next(head.parameters()).device
    with torch.inference_mode():
        return head(torch.as_tensor(vectors).to(device)).argmax(1).cpu().numpy()
