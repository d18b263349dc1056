"""The one training loop of the book, on Lightning Fabric.

One process or several, CPU or GPU, full or mixed precision: the `Fabric` given decides.
Networks run in its precision, losses in float32 on the global batch, so that a metric
loss sees the pairs of all processes. Checkpoints hold what is trained: a frozen
backbone is hashed, not saved at every epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from lightning.fabric import Fabric
from lightning_utilities.core.apply_func import apply_to_collection
from tqdm import tqdm

from histo_utils import provenance
from histo_utils.networks.finetune import digest
from histo_utils.provenance import plain


class Fitted(NamedTuple):
    """A network with the weights of its best epoch (on the CPU), and its history.

    ``history`` has one row per epoch: ``epoch`` (from 1), ``loss``, ``score`` (of
    ``validate``), ``images_per_second``, ``waiting`` (share of time without data),
    ``best``.
    """

    network: torch.nn.Module
    history: pd.DataFrame


def run_folder(parent, settings) -> Path:
    """Folder of the run with these settings and this code: their hash.

    The code is what the package trains with, and the cells of the chapter that is being
    run (``HISTO_CHAPTER``, set by tools/run_notebook.py).
    """
    code = provenance.code_hash("training", "encoders", "losses")
    made_by = [plain(settings), code, os.environ.get("HISTO_CHAPTER", "")]
    text = json.dumps(made_by, sort_keys=True)
    return Path(parent) / hashlib.sha256(text.encode()).hexdigest()[:20]


def fit(
    network, loss, batches, *, optimizer, epochs, folder, schedule=None, validate=None,
    validate_every=1, patience=None, clip=None, accumulate=1, compiled=False,
    settings=None, fabric=None, seed=0, progress=True,
) -> Fitted:  # fmt: skip
    """Train a network; go on where a killed run stopped; return the best epoch.

    Parameters
    ----------
    network : torch.nn.Module
        Trained in the modes its parts are in: what stays in evaluation mode (folded
        batch norm, a frozen backbone) must be so when it is given.
    loss : torch.nn.Module
        ``loss(outputs, labels)``; may have parameters of its own.
    batches : torch.utils.data.DataLoader
        Of (inputs, labels), from `loaders.training_batches`.
    optimizer : torch.optim.Optimizer
        Over the parameters to train; those of the loss among them if it has any.
    epochs : int
    folder : path
        Keeps ``last.pt`` and ``best.pt``, both weights-only files.
    schedule : torch.optim.lr_scheduler.LRScheduler, optional
        Stepped at the end of an epoch.
    validate : callable, optional
        ``validate(network)`` -> number, higher is better, after each epoch with the
        network in evaluation mode; it decides the best epoch (default: the last).
    validate_every : int
        Validate after every so many epochs, and after the last.
    patience : int, optional
        Stop after so many epochs without a better one.
    clip : float, optional
        Largest norm of the network's gradient, after unscaling.
    accumulate : int
        Batches whose gradients are averaged before a step. Refused for a loss that
        compares the items of a batch (its attribute ``pairwise``): it would see the
        pairs of the small batches only.
    compiled : bool
        Run ``torch.compile`` on the network.
    settings : dict, optional
        What the run is made with, its ``seed`` if it names one. A folder of other
        settings is refused.
    fabric : lightning.fabric.Fabric, optional
        Default: one device, full precision. With several devices in a notebook the
        processes are forked here, so nothing may have run on a GPU before.
    seed : int
        Of dropout; each epoch starts from (seed, epoch), so resuming changes nothing.
    progress : bool
        Show one line with loss, images a second and share of time waiting for data.

    Raises
    ------
    FloatingPointError
        NaN or infinity in loss or weights; the last good checkpoint stays.
    ValueError
        The folder holds a run of other settings or with another frozen part; settings
        that name another seed; ``accumulate`` with a pairwise loss.
    """
    fabric = fabric or Fabric(devices=1)
    _check_seed(settings, seed)
    if accumulate > 1 and getattr(loss, "pairwise", False):
        raise ValueError(
            f"accumulate={accumulate} with {type(loss).__name__}, which compares the "
            "items of a batch; give accumulate=1 and more devices or memory instead"
        )
    settings = plain(settings)  # NumPy numbers would not be read again
    last, best_file = Path(folder) / "last.pt", Path(folder) / "best.pt"
    network = network.to(memory_format=torch.channels_last)
    modes = [(part, part.training) for part in network.modules()]
    trained = _trained_names(network)

    def run(fabric):
        _run(
            network, loss, batches, optimizer, schedule, validate, fabric, modes=modes,
            trained=trained, last=last, best_file=best_file, epochs=epochs, clip=clip,
            validate_every=validate_every, patience=patience, accumulate=accumulate,
            compiled=compiled, settings=settings, seed=seed, progress=progress,
        )  # fmt: skip

    if fabric.world_size > 1 and not fabric._launched:
        fabric.launch(run)
    else:
        run(fabric)
    history = torch.load(last, map_location="cpu", weights_only=True)["history"]
    weights = torch.load(best_file, map_location="cpu", weights_only=True)["network"]
    network = network.to("cpu", memory_format=torch.contiguous_format)
    network.load_state_dict(weights, strict=False)
    return Fitted(network.eval(), pd.DataFrame(history))


def _run(
    network, loss, batches, optimizer, schedule, validate, fabric, *, modes, trained,
    last, best_file, epochs, clip, validate_every, patience, accumulate, compiled,
    settings, seed, progress,
):  # fmt: skip
    """Train in one process, of one or of several; the result is in the two files."""
    whole = torch.compile(network) if compiled else network
    whole, stepper = fabric.setup(whole, optimizer)
    loss = loss.to(fabric.device)
    order = batches.batch_sampler
    order.share(fabric.global_rank, fabric.world_size)
    parts = {"network": network, "loss": loss, "optimizer": optimizer}
    parts |= {"schedule": schedule} if schedule else {}
    names = {"settings": settings, "frozen": _frozen(network, trained)}
    history = _resume(last, parts, names, fabric)
    bar = tqdm(
        total=epochs * len(batches), initial=len(history) * len(batches), ascii=True,
        desc="training", disable=not progress or not fabric.is_global_zero,
    )  # fmt: skip
    for epoch in range(len(history) + 1, epochs + 1):
        if _patience_ended(history, patience):
            break
        torch.manual_seed(seed * 1_000_003 + epoch * 1009 + fabric.global_rank)
        order.set_epoch(epoch)
        summed, images, waited, start = 0.0, 0, 0.0, time.perf_counter()
        ready, counts = start, False
        for step, (inputs, labels) in enumerate(batches, 1):
            waited += time.perf_counter() - ready
            begun = (step - 1) // accumulate * accumulate
            several = min(accumulate, len(batches) - begun)
            stepping = step == begun + several
            inputs, labels = fabric.to_device((_channels_last(inputs), labels))
            with fabric.no_backward_sync(whole, enabled=not stepping):
                outputs, labels = _global((whole(inputs), labels), fabric)
                value = loss(_float32(outputs), labels)
                if not torch.isfinite(value):
                    raise FloatingPointError(_bad("loss", value, epoch, step, last))
                if step == begun + 1:
                    stepper.zero_grad()
                if value != 0:  # exactly 0: no anchor counts, and then no step is taken
                    fabric.backward(value if several == 1 else value / several)
                    counts = True
            if stepping and counts:
                if clip:
                    fabric.clip_gradients(
                        whole, stepper, max_norm=clip, error_if_nonfinite=False
                    )
                stepper.step()
                counts = False
            summed, images = summed + value.item(), images + len(labels)
            ready = time.perf_counter()
            speed, share = images / (ready - start), waited / (ready - start)
            bar.set_postfix_str(
                f"epoch {epoch}/{epochs}, loss {summed / step:.4f}, "
                f"{speed:.0f} images/s, {share:.0%} waiting", refresh=False,
            )  # fmt: skip
            bar.update()
        if schedule:
            schedule.step()
        if not all(torch.isfinite(p).all() for p in network.parameters()):
            raise FloatingPointError(_bad("a weight", "NaN", epoch, step, last))
        network.eval()
        due = validate and (epoch % validate_every == 0 or epoch == epochs)
        score = float(validate(network)) if due else float("nan")
        for part, mode in modes:
            part.training = mode
        known = [row["score"] for row in history if row["best"]]
        better = validate is None or bool(due and (not known or score > known[-1]))
        history.append({
            "epoch": epoch, "loss": summed / step, "score": score,
            "images_per_second": round(speed, 2), "waiting": round(share, 4),
            "best": better,
        })  # fmt: skip
        state = {name: part.state_dict() for name, part in parts.items()}
        state["network"] = {name: state["network"][name] for name in trained}
        if better:
            _save({"network": state["network"]}, best_file, fabric)
        _save(state | names | {"history": history}, last, fabric)
    bar.close()


def _trained_names(network):
    """Entries of the state that training can change: not what is frozen."""
    names = {name for name, p in network.named_parameters() if p.requires_grad}
    for name, part in network.named_modules():
        if part.training:  # running means of batch norm
            own = part.named_buffers(name, recurse=False)
            names |= {buffer for buffer, _ in own}
    return [name for name in network.state_dict() if name in names]


def _frozen(network, trained):
    """Hash of what a checkpoint leaves out."""
    kept = set(trained)
    whole = network.state_dict().items()
    return digest({name: tensor for name, tensor in whole if name not in kept})


def _check_seed(settings, seed):
    """Refuse settings of another seed: five seeds would share one folder, unnoticed."""
    named = (settings or {}).get("seed", seed)
    if named != seed:
        raise ValueError(
            f"settings name seed {named}, but seed={seed} was given: all seeds would "
            "share one folder and be one run; name the run's own seed"
        )


def _resume(last, parts, names, fabric):
    """Load the last checkpoint into the parts; return its history."""
    if not last.is_file():
        return []
    state = torch.load(last, map_location=fabric.device, weights_only=True)
    for name, wanted in names.items():
        if state[name] != wanted:
            raise ValueError(
                f"{last.parent} holds a run with {name} {state[name]}; this one has "
                f"{wanted}: give it a folder of its own"
            )
    for name, part in parts.items():
        strict = {"strict": False} if name == "network" else {}
        part.load_state_dict(state[name], **strict)
    return state["history"]


def _save(state, path, fabric):
    if fabric.is_global_zero:
        with provenance.new_file(path) as part:
            torch.save(state, part)
    fabric.barrier()


def _global(outputs, fabric):
    """Gather the outputs of all processes, gradients included."""
    if fabric.world_size == 1:
        return outputs
    gathered = fabric.all_gather(outputs, sync_grads=True)
    return apply_to_collection(gathered, torch.Tensor, lambda x: x.flatten(0, 1))


def _float32(outputs):
    return apply_to_collection(outputs, torch.Tensor, lambda x: x.float())


def _channels_last(inputs):
    def arranged(x):
        return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x

    return apply_to_collection(inputs, torch.Tensor, arranged)


def _patience_ended(history, patience):
    best = [row["epoch"] for row in history if row["best"]]
    if patience is None or not best:  # none before the first validation
        return False
    return history[-1]["epoch"] - best[-1] >= patience


def _bad(what, value, epoch, step, last):
    kept = f"the last good checkpoint is {last}" if last.is_file() else "none was saved"
    return (
        f"{what} is {value} in epoch {epoch}, batch {step}; {kept}. Lower the learning "
        "rate, set clip, and look at the images of this batch"
    )
