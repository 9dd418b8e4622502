"""Students of some of a model's layers: a half or a third of its cost, and much to learn again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from st_wkl.data.provenance import licence_of
from st_wkl.files import cache_folder, content_hash, expanded, holds_nothing, replacing_folder, write_text
from st_wkl.models import AnyModel, check_one_transformer, identity, load_model
from st_wkl.training.lora import difference, has_adapter, outputs

# What is saved and loaded again differs by nothing but the order of sums.
_TOLERANCE = 1e-5


def cut_layers(
    model: AnyModel | str | Path,
    keep: int | Sequence[int] = 3,
    *,
    output: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Save a model with some of its transformer's layers: a plain model of its class that is a student to start with.

    What it loses, distillation has to bring back: it is worth nothing before it is trained.

    Args:
        model: Any of the four model classes, a folder, a Hub id or a `packaged:` name; it is not changed.
        keep: How many layers, spread evenly from the first to the last, since the last writes what pooling and head
            expect: of all-MiniLM-L6-v2's six (nDCG@10 .432 on Cranfield), untrained, 0, 2, 5 leave .297, 1, 3, 5 .269
            and 0, 2, 4 .086. Or their numbers, counting from 0.
        output: New folder for it. Default: one in the user's cache, by the model and the layers.
        trust_remote_code: Run code of the model's repository. Only for those that you have read.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds something.
        ValueError: The model has no such layers, or not one stack of them; it has an adapter; or what is saved of it
            gives other outputs when it is loaded, as where a kept layer was made for another place.

    Example:
        >>> from st_wkl import cut_layers, distill
        >>> student = cut_layers("sentence-transformers/all-MiniLM-L6-v2", keep=3)  # doctest: +SKIP
        >>> distill(student, dataset, output_dir="small-student")  # doctest: +SKIP
    """
    loaded, name = load_model(model, trust_remote_code=trust_remote_code)
    if has_adapter(loaded):
        raise ValueError(f"{name} has an adapter: st_wkl.merge makes a plain model of it, whose layers can be cut.")
    check_one_transformer(loaded, "cut_layers")
    transformer: Any = loaded.transformers_model
    count, stack = _stack(transformer, name)
    layers = _chosen(keep, count)
    short = f"{name.rpartition('/')[2]}-layers-{'-'.join(map(str, layers))}"
    if output is None:
        folder = cache_folder() / "cut" / f"{short}-{content_hash(identity(loaded), size=6)}"
        if folder.is_dir():
            return folder
    elif not holds_nothing(folder := Path(expanded(output))):
        raise FileExistsError(f"{folder} is not empty. Choose another folder, or delete it if it may go.")
    small = copy.deepcopy(loaded).eval()
    _cut(small.transformers_model, stack, count, layers)
    with replacing_folder(folder) as new:
        small.save_pretrained(str(new), create_model_card=False)
        write_text(new / "README.md", _card(name, model, loaded, layers, count))
        again = load_model(new, trust_remote_code=trust_remote_code)[0].eval()
        if (apart := difference(outputs(small), outputs(again))) > _TOLERANCE:
            raise ValueError(
                f"{name} with the layers {layers} answers otherwise (by {apart:.2g}) once it is saved and loaded: "
                "its layers differ by their place, as where the first has no norm. Keep layer 0, or cut others."
            )
    return folder


def _chosen(keep: int | Sequence[int], count: int) -> list[int]:
    """Return the numbers of the layers that stay."""
    if isinstance(keep, int) and not isinstance(keep, bool):
        if not 0 < keep < count:
            raise ValueError(f"keep must be from 1 to {count - 1}, since the model has {count} layers, got {keep}.")
        return np.linspace(0, count - 1, keep).round().astype(int).tolist() if keep > 1 else [0]
    layers = [*keep] if isinstance(keep, Sequence) and not isinstance(keep, str) else []
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in layers)
    if not layers or not whole or layers != sorted({*layers}) or layers[0] < 0 or layers[-1] >= count:
        raise ValueError(
            f"keep must be a number of layers, or some of 0 to {count - 1} in their order, once each, got {keep!r}."
        )
    if len(layers) == count:
        raise ValueError(f"keep names all {count} layers, so nothing would be cut.")
    return layers


def _stack(transformer: Any, name: str) -> tuple[int, str]:
    """Return how many layers a transformer has, and the name of the list of them."""
    count = None
    config: Any = getattr(transformer, "config", None) if isinstance(transformer, nn.Module) else None
    if config is not None:
        count = getattr(config.get_text_config(), "num_hidden_layers", None)
    found = (
        []
        if count is None
        else [
            place
            for place, part in transformer.named_modules()
            if isinstance(part, nn.ModuleList) and len(part) == count
        ]
    )
    if not found:
        raise ValueError(f"{name} has no layers of a transformer that torch computes, so none can be cut.")
    if len(found) > 1:
        raise ValueError(f"{name} has several stacks of {count} layers ({', '.join(found)}); which one to cut is open.")
    return int(count or 0), found[0]


def _cut(transformer: Any, stack: str, count: int, layers: list[int]) -> None:
    """Leave some layers, and let the configuration say so."""
    home, _, attribute = stack.rpartition(".")
    parts = transformer.get_submodule(stack)
    kept = nn.ModuleList([parts[number] for number in layers])
    setattr(transformer.get_submodule(home), attribute, kept)
    for number, layer in enumerate(kept):
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = number  # type: ignore[assignment]
    # Several parts may hold one configuration, or copies of it.
    held = [part.config for part in transformer.modules() if hasattr(getattr(part, "config", None), "get_text_config")]
    for config in {id(one): one for one in (config.get_text_config() for config in held)}.values():
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == count and key.startswith(("layer", "mlp_layer", "no_rope")):
                setattr(config, key, [value[number] for number in layers])
        if getattr(config, "num_hidden_layers", None) == count:
            config.num_hidden_layers = len(layers)


def _card(name: str, source: Any, model: Any, layers: list[int], count: int) -> str:
    """Return a card that says what this is: without it, the original's results would be taken for its own."""
    licence = licence_of(source, model)
    front = [f"base_model: {name}"] if "/" in name else []
    front += [f"license: {licence}"] if licence else []
    head = "---\n" + "\n".join(front) + "\n---\n\n" if front else ""
    return (
        f"{head}# {name}, {len(layers)} of {count} layers\n\nThe layers {', '.join(map(str, layers))} (counted from 0) "
        f"of {name}, to start a distillation with. It was not trained since, so it is no good for anything else.\n"
    )
