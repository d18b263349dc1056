"""Which trainings an experiment of a paper runs, as its notebook runs them."""

from typing import NamedTuple

from histo_utils.networks import finetune


class Stage(NamedTuple):
    """One training of an experiment: its network, and how often which images."""

    network: dict  # of `network_of`
    batch: int
    states: int  # numbers that the optimiser keeps per trained parameter
    train: float  # images per epoch
    epochs: int
    runs: float  # seeds, losses, systems, shares
    forward: float = 0  # images embedded or validated, all runs


def stages(chapter, p, n):
    """Trainings of an experiment, as its notebook runs them; images decoded."""
    seeds = p.get("seeds", 1)
    seeds = len(seeds) if isinstance(seeds, list) else seeds
    net, size, total = p["network"], p.get("input_size"), sum(n.values())
    train, test, every = n.get("train", 0), n.get("test", 0), p.get("validate_every", 1)
    if chapter == "04":
        few, runs = p["per_class"], len(p["kinds"]) * seeds
        held, classes = 24 * max(1, few // 11), 24
        used = min(train, classes * few)
        most, own, found = p["epochs"], p.get("scratch", {}), []
        if "tuned" in p["rates"]:
            how = {"kind": "04", "name": net, "size": size, "hidden": p["hidden"]}
            forward = runs * most["tuned"] * held
            found += [Stage(how | {"classes": classes}, p["batch_size"], 1, used - held,
                most["tuned"], runs, forward)]  # fmt: skip
        if "scratch" in p["rates"]:
            how = {"kind": "cbr", "name": "", "classes": classes} | own
            found += [
                Stage(how, p["batch_size"], 1, used - held, most["scratch"], runs)
            ]
        views = (p["views"] + 6) * len(p["kinds"])  # embeddings, fronts, baselines
        return found, views * (used + test)
    if chapter == "05":
        val, found = n.get("validation", 0), []
        for name, (epochs, batch) in p["configurations"].items():
            how = {"kind": "05", "name": net, "size": size, "trained": name}
            if name not in finetune.PARTS["densenet121"]:
                widths = {"widths": [16, 32, 64, 128], "size": p["cbr_size"]}
                how = {"kind": "cbr", "name": ""} | widths
            forward = seeds * (epochs * val + total)
            found += [Stage(how | {"classes": 30}, batch, 2, train, epochs, seeds,
                forward)]  # fmt: skip
        return found, sum(s.runs * s.epochs * s.train + s.forward for s in found)
    if chapter == "06":
        epochs, used = p["epochs"][-1], train * (1 - p["held_out"])
        forward = seeds * (epochs * (train - used) + total) + len(p["turns"]) * total
        how = {"kind": "06", "name": net, "size": size, "hidden": 256, "classes": 9}
        found = [Stage(how, p["batch_size"], 2, used, epochs, seeds, forward)]
        return found, seeds * epochs * used + forward
    if chapter == "07":
        epochs, tried = max(p["epochs"].values()), len(p["loss_names"]) - 1
        runs = seeds * (tried + sum({*p.get("shares", []), 1.0}))
        forward = runs * (epochs / every * 0.1 * train + total)
        how = {"kind": "07", "name": net, "size": size}
        how["options"] = {"dim": p["dim"]} | p["network_options"]
        batch = p["batch_size"]
        found = [Stage(how, batch, 1, 0.9 * train, epochs, runs, forward)]
        return found, runs * epochs * 0.9 * train + forward
    if chapter == "08":
        epochs, runs = p["epochs"], seeds * len(p.get("systems", range(4)))
        forward = runs * (epochs / every * train + total)  # train is the gallery
        options = {k: p[k] for k in ("out_indices", "channels", "num_layers")}
        how = {"kind": "08", "name": net, "size": size, "options": options}
        found = [Stage(how, p["batch_size"], 3, 0.9 * train, epochs, runs, forward)]
        return found, runs * epochs * 0.9 * train + forward
    how = {"kind": "frozen", "name": net, "size": size}  # embedding alone
    return [Stage(how, 32, 0, 0, 0, 0, total)], total
