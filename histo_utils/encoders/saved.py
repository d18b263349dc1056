"""Encoders on disk: weights as safetensors, everything else as JSON."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from histo_utils import provenance
from histo_utils.encoders.checkpoints import fit_state, read_state
from histo_utils.encoders.encoder import Card, Encoder
from histo_utils.encoders.registry import NETWORKS, build
from histo_utils.loaders import Preprocessing

FORMAT = 1  # of a saved encoder
WEIGHTS, FACTS = "weights.safetensors", "encoder.json"
KEYS = {"name", "dimension", "recipe", "preprocessing", "card", "weights_sha256"}


def save(encoder, folder, extra=None) -> Path:
    """Write an encoder into a folder: ``weights.safetensors`` and ``encoder.json``.

    An older encoder there is replaced, as a whole or not at all.

    Parameters
    ----------
    encoder : Encoder
        With a recipe.
    folder : path
    extra : dict, optional
        What else to keep, such as how it was trained; as JSON can hold it.

    Raises
    ------
    ValueError
        No recipe, one that builds another network than the encoder's, or something
        that JSON cannot hold.
    FileExistsError
        The folder holds something else.
    """
    if encoder.recipe is None:
        raise ValueError(
            f"{encoder.name} has no recipe to build its network again. Make it with "
            "frozen(), or give Encoder(…, recipe={'network': <name>, **options}), a "
            f"name in encoders.NETWORKS: {', '.join(NETWORKS)}; for a class of your "
            "own, keep its state dict"
        )
    # Clones, since safetensors refuses tensors that share memory.
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in encoder.network.state_dict().items()
    }
    fit_state(build(encoder.recipe), state, f"the network of {encoder.name}")
    facts = {
        "format": FORMAT, "name": encoder.name, "dimension": encoder.dimension,
        "recipe": encoder.recipe, "preprocessing": asdict(encoder.preprocessing),
        "card": asdict(encoder.card), "extra": extra,
    }  # fmt: skip
    with provenance.new_folder(folder, {WEIGHTS, FACTS}, "a saved encoder") as fresh:
        save_file(state, fresh / WEIGHTS)
        facts["weights_sha256"] = _sha256(fresh / WEIGHTS)
        try:
            text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{encoder.name}: recipe or extra cannot be written as JSON ({error}); "
                "give text, finite numbers, lists and dicts"
            ) from error
        (fresh / FACTS).write_text(text + "\n", "utf8")
    return Path(folder)


def load(folder, device="cpu") -> Encoder:
    """Read what `save` wrote: the same vectors, in evaluation mode, frozen.

    What was given to `save` as ``extra`` stands in ``encoder.json``.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        Damaged files, weights that do not fit the recipe, or a newer format.
    """
    folder = Path(folder)
    missing = [name for name in (WEIGHTS, FACTS) if not (folder / name).is_file()]
    if missing:
        names = " and no ".join(missing)
        raise FileNotFoundError(f"{folder} has no {names}: encoders.save writes them")
    damaged = "is damaged; save the encoder again"
    try:
        facts = json.loads((folder / FACTS).read_text("utf8"))
        version = facts["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FACTS} {damaged} ({error!r})") from error
    if version != FORMAT:
        known = f"this version of histo_utils reads {FORMAT}: update histo_utils"
        raise ValueError(f"{folder / FACTS} has format {version}; {known}")
    absent = ", ".join(sorted(KEYS - facts.keys()))
    if absent:
        raise ValueError(f"{folder / FACTS} {damaged}: it says nothing of {absent}")
    state = read_state(folder / WEIGHTS)
    if _sha256(folder / WEIGHTS) != facts["weights_sha256"]:
        other = "is not the file that was saved (another SHA-256): damaged or replaced"
        raise ValueError(f"{folder / WEIGHTS} {other}; save the encoder again")
    network = fit_state(build(facts["recipe"]), state, str(folder))
    how = facts["preprocessing"]
    how |= {"mean": tuple(how["mean"]), "std": tuple(how["std"])}
    return Encoder(
        facts["name"], network.requires_grad_(False).eval().to(device),
        Preprocessing(**how), facts["dimension"], Card(**facts["card"]),
        facts["recipe"],
    )  # fmt: skip


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
