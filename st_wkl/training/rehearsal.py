"""What is kept of an adapter, tried before hours are spent on it: saving, loading, going on, merging."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from st_wkl.models import is_trusted, load_model
from st_wkl.training.lora import TOLERANCE, complete_names, difference, merged_in_place, outputs, save, unfreeze
from st_wkl.training.lora_config import adapter_of, heads, options_of

if TYPE_CHECKING:
    from sentence_transformers.base.trainer import BaseTrainer
    from torch import Tensor, nn

    from st_wkl.losses.scoring import Student

# Large beside what a loader that makes weights anew would leave, small beside the weights.
_NOISE = 0.02
# Adding an update to a weight rounds, in proportion to what comes out.
_MERGED = 1e-4


def rehearse(student: Student, *, trust_remote_code: bool = False) -> None:
    """Save, load, unfreeze and merge a student with an adapter that is no longer as it started.

    peft has dozens of variants, of which some lose weights on the way: whether those that are asked for do is tried.
    The student stays as it is, and so do the random numbers.

    Raises:
        ValueError: If something is lost, with the options of the adapter that are not the usual ones.
        RuntimeError: If the base model is another one than lies where it came from.
    """
    devices = [student.device.index or 0] if student.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _changed(student), tempfile.TemporaryDirectory() as folder:
        try:
            save(student, folder)
        except RuntimeError as error:  # two options that own one weight
            lost: str | None = f"the adapter cannot be saved ({str(error).splitlines()[0]})"
        else:
            trusted = is_trusted(student, trust_remote_code)
            lost = _lost(student, load_model(Path(folder), trust_remote_code=trusted, dtype=student.dtype)[0])
    if lost is None:
        return
    usual = {"modules_to_save": heads(student)}  # of the default adapter of a cross-encoder
    if options := {n: v for n, v in options_of(adapter_of(student)).items() if v != usual.get(n)}:
        told = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(
            f"With {told} in the LoraConfig, {lost}, with this model and the installed versions of peft and "
            "transformers. Leave the option away; nothing was trained."
        )
    raise RuntimeError(
        f"{lost}. An adapter carries no weights of its base model that were new or were changed when it was put on, as "
        "the pooler of a fresh cross-encoder. Save the base model first and train on from its folder, or train without "
        "lora."
    )


def keep_exactly(trainer: BaseTrainer, *, trust_remote_code: bool = False) -> None:
    """Let a trainer's checkpoints hold all of an adapter, and give it back in the number type that it is trained in."""
    save_checkpoint = trainer._save

    def _save(output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        save_checkpoint(output_dir, state_dict)
        complete_names(output_dir or str(trainer.args.output_dir))

    def _load_from_checkpoint(checkpoint_path: str) -> None:
        model: Any = getattr(trainer.model, "_orig_mod", trainer.model)
        # By its default, an adapter is rounded to the number type that its base model is stored in.
        trusted = is_trusted(model, trust_remote_code)
        found = load_model(Path(checkpoint_path), trust_remote_code=trusted, dtype=model.dtype)[0]
        model.load_state_dict(found.state_dict())

    trainer._save = _save  # type: ignore[method-assign]
    trainer._load_from_checkpoint = _load_from_checkpoint  # type: ignore[method-assign]


def _lost(student: Any, loaded: Any) -> str | None:
    """Say what does not come back, None if all does."""
    weights = _trained(student)
    unfreeze(loaded)
    again = _trained(loaded)
    if again.keys() != weights.keys():
        name = sorted(again.keys() ^ weights.keys())[0]
        return f"a saved adapter could not be trained further: {name} would be frozen, or wrongly trained"
    for name, weight in weights.items():
        if not torch.allclose(weight, again[name], rtol=0, atol=TOLERANCE):
            return f"the trained weights {name} do not come back from the adapter's folder"
    before = outputs(student)
    if difference(before, outputs(loaded)) > TOLERANCE:
        return "a student that is loaded from its folder is another one"
    loaded.float()
    before, tokens = outputs(loaded), _tokens(loaded)
    try:
        merged = merged_in_place(loaded)
        merged.transformers_model.tie_weights()  # as loading does
    except (NotImplementedError, ValueError) as error:
        return f"the adapter cannot be merged ({error})"
    scale = max(1.0, *(float(abs(value).max()) for value in before))
    if difference(before, outputs(merged)) > _MERGED * scale or not torch.allclose(tokens, _tokens(merged), atol=1e-5):
        return "a merged student is another one"
    return None


def _trained(student: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in student.named_parameters() if weight.requires_grad}


def _tokens(student: Any) -> Tensor:
    """Return the table of embeddings of tokens, as a text would be given them; few tokens stand in the samples."""
    table = student.transformers_model.get_input_embeddings()
    with torch.no_grad():
        found: Tensor = table(torch.arange(table.weight.shape[0], device=student.device))
    return found


@contextmanager
def _changed(student: Student) -> Iterator[None]:
    """Change the weights that are trained, and bring them back."""
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn_like(weight), alpha=_NOISE)
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)
