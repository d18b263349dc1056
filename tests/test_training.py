"""The training loop: the same weights after a kill, the same loss on two processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from small_run import batches, data, parts, run
from torch import nn

from histo_utils.losses import MultiSimilarityLoss
from histo_utils.training import fit, run_folder


def script(tmp_path, lines):
    """Command of a process that makes the run of `small_run` in its own way."""
    path = tmp_path / "train.py"
    head = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    head += "from small_run import run\nfrom lightning.fabric import Fabric\n"
    path.write_text(head + textwrap.dedent(lines), "utf8")
    return [sys.executable, str(path)]


def same_weights(a, b):
    return all(
        torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items()
    )


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_weights_to_the_bit(tmp_path):
    whole = run(tmp_path / "whole")
    folder = tmp_path / "killed"
    command = script(tmp_path, f"run({str(folder)!r}, pause=1.0)")
    process = subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    deadline = time.time() + 120
    while not (folder / "last.pt").is_file() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(torch.load(folder / "last.pt", weights_only=True)["history"])
    assert 1 <= done < 6
    resumed = run(folder)
    assert same_weights(resumed.network, whole.network)
    columns = ["epoch", "loss", "score", "best"]
    assert resumed.history[columns].equals(whole.history[columns])
    last = [torch.load(f / "last.pt", weights_only=True)["network"]
            for f in (folder, tmp_path / "whole")]  # fmt: skip
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


@pytest.mark.slow
@pytest.mark.parametrize("start", ["ddp", "ddp_fork"])  # a script's, a notebook's
def test_two_processes_see_the_global_batch(tmp_path, start):
    one = run(tmp_path / "one", epochs=2, dropout=0.0)
    folder = tmp_path / "two"
    lines = f"""
    if __name__ == "__main__":
        fabric = Fabric(accelerator="cpu", devices=2, strategy={start!r})
        if {start!r} == "ddp":
            fabric.launch()
        fitted = run({str(folder)!r}, epochs=2, dropout=0.0, fabric=fabric)
        assert list(fitted.history["epoch"]) == [1, 2]
    """
    subprocess.run(script(tmp_path, lines), check=True, timeout=300)
    state = torch.load(folder / "last.pt", weights_only=True)
    losses = [row["loss"] for row in state["history"]]
    assert losses == pytest.approx(list(one.history["loss"]), abs=1e-6)
    weights = torch.load(tmp_path / "one" / "last.pt", weights_only=True)["network"]
    for name, tensor in weights.items():  # so the gradients were those of one process
        torch.testing.assert_close(state["network"][name], tensor, atol=1e-5, rtol=1e-5)


def test_half_a_global_batch_has_another_loss(tmp_path):
    """What the two processes would report if each saw its own half only."""
    network, _, _ = parts(dropout=0.0)
    batch = next(iter(batches(16, 4, seed=1)))
    loss = MultiSimilarityLoss()
    outputs, labels = network(batch[0]), batch[1]
    halves = [float(loss(outputs[i::2], labels[i::2]).detach()) for i in (0, 1)]
    assert abs(np.mean(halves) - float(loss(outputs, labels).detach())) > 1e-3


def test_one_step_is_the_plain_step_by_hand(tmp_path):
    network, optimizer, _ = parts(dropout=0.0)
    fed = batches(16, 4, steps=1, seed=1)
    fed.batch_sampler.set_epoch(1)
    inputs, labels = next(iter(fed))
    by_hand, plain, _ = parts(dropout=0.0)
    value = MultiSimilarityLoss()(by_hand(inputs), labels)
    value.backward()
    nn.utils.clip_grad_norm_(by_hand.parameters(), 0.01)
    plain.step()
    fitted = fit(
        network, MultiSimilarityLoss(), fed, optimizer=optimizer, epochs=1,
        folder=tmp_path, clip=0.01, progress=False,
    )  # fmt: skip
    assert fitted.history["loss"][0] == pytest.approx(float(value.detach()), abs=1e-6)
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(fitted.network.state_dict()[name], tensor)


def test_the_best_epoch_comes_back_and_patience_ends_the_run(tmp_path):
    network, optimizer, _ = parts()
    scores, seen = iter([0.2, 0.7, 0.5, 0.6, 0.9]), []

    def validate(network):
        seen.append({k: v.clone() for k, v in network.state_dict().items()})
        return next(scores)

    fitted = fit(
        network, MultiSimilarityLoss(), batches(16, 4),
        optimizer=optimizer, epochs=5, folder=tmp_path, validate=validate, patience=2,
        progress=False,
    )  # fmt: skip
    assert list(fitted.history["score"]) == [0.2, 0.7, 0.5, 0.6]
    assert list(fitted.history["best"]) == [True, True, False, False]
    found = fitted.network.state_dict()
    assert all(torch.equal(found[name], seen[1][name]) for name in found)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    run(tmp_path, epochs=2)
    before = (tmp_path / "last.pt").read_bytes()
    network, optimizer, schedule = parts()
    broken = data()
    broken.tensors[0][7] = broken.tensors[1][7] = torch.nan
    with pytest.raises(FloatingPointError, match=r"epoch 3.*last good checkpoint is"):
        fit(
            network, MultiSimilarityLoss(), batches(16, 4, of=broken, seed=1),
            optimizer=optimizer, schedule=schedule, epochs=4, folder=tmp_path,
            progress=False,
        )  # fmt: skip
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_folder_of_other_settings_is_refused(tmp_path):
    run(tmp_path, epochs=1, settings={"rate": 0.05})
    with pytest.raises(ValueError, match="folder of its own"):
        run(tmp_path, epochs=2, settings={"rate": 0.1})


def test_settings_may_hold_numpy_numbers(tmp_path):
    settings = {"rate": np.float64(0.05), "seed": np.int64(0), "turns": (0, 4)}
    run(tmp_path / "a", epochs=1, settings=settings)
    # read back and compared: nothing is refused, and the run goes on
    assert len(run(tmp_path / "a", epochs=2, settings=settings).history) == 2
    same = {"turns": [0, 4], "seed": 0, "rate": 0.05}
    assert run_folder(tmp_path, settings) == run_folder(tmp_path, same)
    assert run_folder(tmp_path, same | {"seed": 1}) != run_folder(tmp_path, same)


def test_settings_of_another_seed_are_refused(tmp_path):
    """A parameter called seed once overwrote the run's own: five seeds were one run."""
    run(tmp_path / "a", epochs=1, settings={"seed": 3}, seed=3)
    with pytest.raises(ValueError, match="settings name seed 0, but seed=3"):
        run(tmp_path / "b", epochs=1, settings={"seed": 0}, seed=3)


def test_parts_stay_in_the_mode_they_were_given_in(tmp_path):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 4))
    network[0].eval().requires_grad_(False)
    network[0].running_mean += 0.5
    optimizer = torch.optim.SGD(network[2].parameters(), lr=0.01)
    modes = []
    fit(
        network, nn.CrossEntropyLoss(), batches(16),
        optimizer=optimizer, epochs=2, folder=tmp_path, progress=False,
        validate=lambda n: modes.append([p.training for p in n.modules()]) or 0.0,
    )  # fmt: skip
    assert torch.equal(network[0].running_mean, torch.full((3,), 0.5))
    assert not any(modes[0]) and not any(modes[1])


def test_a_zero_loss_takes_no_step(tmp_path):
    """With momentum or weight decay even a zero gradient would move the weights."""
    network, _, _ = parts(dropout=0.0)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.5)
    alone = batches(16, labels=np.arange(48))  # no positives: no valid anchor
    fitted = fit(
        network, MultiSimilarityLoss(), alone,
        optimizer=optimizer, epochs=1, folder=tmp_path, progress=False,
    )  # fmt: skip
    assert all(
        torch.equal(fitted.network.state_dict()[k], v) for k, v in before.items()
    )


def test_mixed_precision_computes_the_loss_in_float32(tmp_path):
    seen = []

    class Watching(MultiSimilarityLoss):
        def forward(self, embeddings, labels):
            seen.append(embeddings.dtype)
            return super().forward(embeddings, labels)

    network, optimizer, _ = parts()
    fitted = fit(
        network, Watching(), batches(16, 4), optimizer=optimizer,
        epochs=1, folder=tmp_path, progress=False,
        fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"),
    )  # fmt: skip
    assert set(seen) == {torch.float32}
    assert next(fitted.network.parameters()).dtype == torch.float32


def classifier():
    """A frozen layer with batch norm in evaluation mode, and a trained head."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
                            nn.BatchNorm1d(144), nn.Linear(144, 4))  # fmt: skip
    network[:2].eval().requires_grad_(False)
    optimizer = torch.optim.SGD(network[3:].parameters(), lr=0.05)
    return network, optimizer


def fit_classifier(network, optimizer, folder, size=16, **more):
    more = {"epochs": 1} | more
    return fit(
        network, nn.CrossEntropyLoss(), batches(size, seed=1), optimizer=optimizer,
        folder=folder, progress=False, **more,
    )  # fmt: skip


def test_accumulated_batches_take_the_step_of_one_large_batch(tmp_path):
    """Without batch norm and with equal parts, mean gradients are the same."""
    found = []
    for size, accumulate in ((48, 1), (16, 3), (16, 2)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        fit_classifier(
            network, optimizer, tmp_path / f"{size}-{accumulate}", size,
            accumulate=accumulate,
        )  # fmt: skip
        found.append(network[1].weight.detach())
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-4)  # two steps, not one
    with pytest.raises(ValueError, match="accumulate=2 with MultiSimilarityLoss"):
        run(tmp_path / "pairs", accumulate=2)


def test_checkpoints_hold_what_is_trained_and_know_what_is_frozen(tmp_path):
    network, optimizer = classifier()
    fitted = fit_classifier(network, optimizer, tmp_path)
    saved = torch.load(tmp_path / "best.pt", weights_only=True)["network"]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert set(saved) == {f"3.{n}" for n in norm} | {"4.weight", "4.bias"}
    again, optimizer = classifier()
    loaded = fit_classifier(again, optimizer, tmp_path)  # finished: loads, trains not
    assert same_weights(loaded.network, fitted.network)
    other, optimizer = classifier()
    other[0].weight.data += 1
    with pytest.raises(ValueError, match="holds a run with frozen"):
        fit_classifier(other, optimizer, tmp_path)


def test_validation_every_second_epoch_and_after_the_last(tmp_path):
    network, optimizer = classifier()
    scores = iter([0.3, 0.1, 0.2])
    fitted = fit_classifier(
        network, optimizer, tmp_path, epochs=5, validate=lambda n: next(scores),
        validate_every=2,
    )  # fmt: skip
    assert fitted.history["score"].round(1).fillna(-1).tolist() == [
        -1,
        0.3,
        -1,
        0.1,
        0.2,
    ]
    assert fitted.history["best"].tolist() == [False, True, False, False, False]
    # patience counts from the first validated epoch on
    network, optimizer = classifier()
    scores = iter([0.3, 0.1, 0.2])
    fitted = fit_classifier(
        network, optimizer, tmp_path / "patient", epochs=9, patience=1,
        validate=lambda n: next(scores), validate_every=2,
    )  # fmt: skip
    assert fitted.history["epoch"].tolist() == [1, 2, 3]
