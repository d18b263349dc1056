"""Grad-CAM: where in an image a score of a network comes from."""

import numpy as np
import torch
import torch.nn.functional as F

NO_PATH = "the scores do not depend on the layer; choose an earlier one"


def grad_cam(network, layer, images, scores) -> np.ndarray:
    """Heat maps of images: how much each place raised a score.

    Channels of a layer's map are weighted by the mean gradient of the score over
    places, summed, and cut at 0 (Selvaraju et al. 2017, equations 1 and 2); then
    enlarged to the image (bilinear) and divided by the image's highest value. Maps of
    two images have no common scale.

    Parameters
    ----------
    network : torch.nn.Module
        Used in evaluation mode and left as it was; its parameters may be frozen.
    layer : torch.nn.Module
        Module of the network that gives (b, c, u, v), such as the last convolution.
    images : (b, 3, h, w) float tensor
        Preprocessed, on the network's device.
    scores : callable, int or (b,) array of int
        The network's output -> one score per image (b,), such as the similarity to a
        neighbour's vector; or the class, or each image's, whose output is the score.

    Returns
    -------
    (b, h, w) float32 array, 0–1
        0 all over where no place raised the score.

    Raises
    ------
    ValueError
        A layer that is not in the network, runs not exactly once, or gives no map;
        scores of another shape, or that the layer does not reach.

    Examples
    --------
    >>> network = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten())
    >>> image, like = torch.eye(2).reshape(1, 1, 2, 2), torch.ones(1, 4)
    >>> grad_cam(network, network[0], image, lambda v: F.cosine_similarity(v, like))
    array([[[1., 0.],
            [0., 1.]]], dtype=float32)
    """
    which = f"the layer, a {type(layer).__name__},"
    if not any(module is layer for module in network.modules()):
        raise ValueError(f"{which} is not in the network; see network.modules()")
    seen = []

    def watch(module, given, found):
        if not torch.is_tensor(found) or found.ndim != 4:
            given = tuple(getattr(found, "shape", ())) or type(found)
            raise ValueError(
                f"{which} gave {given}; expected a map (b, c, u, v): choose a layer "
                "before the pooling"
            )
        torch.set_grad_enabled(True)  # until the caller's context ends
        seen.append(found.detach().clone().requires_grad_())
        return seen[-1].clone()  # what follows may write over its input

    modes = {module: module.training for module in network.modules()}
    hook = layer.register_forward_hook(watch)
    try:
        network.eval()
        with torch.inference_mode(False), torch.no_grad():
            values = _scored(network(images), scores, len(images))
            if len(seen) != 1:
                times = f"ran {len(seen)} times for one batch"
                raise ValueError(f"{which} {times}; choose one that runs once")
            slopes = torch.autograd.grad(values.sum(), seen[0], allow_unused=True)[0]
    finally:
        hook.remove()
        for module, training in modes.items():
            module.training = training
    if slopes is None:
        raise ValueError(NO_PATH)
    weights = slopes.mean(dim=(2, 3), keepdim=True)
    heat = F.relu((weights * seen[0].detach()).sum(dim=1, keepdim=True)).float()
    heat = F.interpolate(heat, images.shape[-2:], mode="bilinear")[:, 0]
    top = heat.amax(dim=(1, 2), keepdim=True)
    return (heat / torch.where(top > 0, top, 1)).cpu().numpy()


def _scored(output, scores, n):
    if callable(scores):
        values = scores(output)
        shape = tuple(getattr(values, "shape", ()))
        if not torch.is_tensor(values) or shape != (n,):
            raise ValueError(f"scores gave {shape} for {n} images; expected ({n},)")
    else:
        classes = torch.as_tensor(scores, device=output.device).expand(n)
        if output.ndim != 2 or ((classes < 0) | (classes >= output.shape[1])).any():
            raise ValueError(
                f"classes {classes.tolist()} of an output {tuple(output.shape)}; "
                "expected (b, classes) and numbers below it: give a callable otherwise"
            )
        values = output[torch.arange(n, device=output.device), classes]
    if not values.requires_grad:
        raise ValueError(NO_PATH)
    return values
