"""From a dataset and a student to a trained student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st_wkl.cli._answers import Answer, JsonOption, QuietOption, answering

if TYPE_CHECKING:
    pass


@answering
def train(
    dataset: Annotated[Path, typer.Argument(help="Folder that `st-wkl build` made.")],
    student: Annotated[str, typer.Option(help="Student: Hub id or folder.")],
    output: Annotated[Path, typer.Option(help="Folder for the trained student.")],
    loss: Annotated[str, typer.Option(help="weighted-kl or margin-kl.")] = "weighted-kl",
    gamma: Annotated[float, typer.Option(help="Strength of the weights of weighted-kl; 0 and --alpha 0 is KL.")] = 5.0,
    alpha: Annotated[float, typer.Option(help="Strength of the rank bias of weighted-kl.")] = 1.0,
    student_temperature: Annotated[float | None, typer.Option(help="Default: 0.05 for cosine, else 1.")] = None,
    teacher_temperature: Annotated[float, typer.Option(help="Divides the teacher's logits.")] = 1.0,
    epochs: Annotated[float, typer.Option(help="Passes over the dataset.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries per step.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 3e-2 for static students, else 2e-5.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the data.")] = 42,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Answer:
    """Train a student on a distillation dataset and save it with its card and the record of its making."""
    from dataclasses import asdict

    from sentence_transformers import SentenceTransformer

    from st_wkl.data.dataset import DistillationDataset
    from st_wkl.losses import MarginKL, WeightedKLDistillationLoss
    from st_wkl.training import default_arguments, distill

    if loss not in ("weighted-kl", "margin-kl"):
        raise ValueError(f"--loss must be weighted-kl or margin-kl, got {loss!r}.")
    data = DistillationDataset.load_from_disk(dataset)
    model = SentenceTransformer(student)
    temperatures: dict[str, Any] = {
        "student_temperature": student_temperature,
        "teacher_temperature": teacher_temperature,
    }
    chosen = (
        WeightedKLDistillationLoss(model, gamma, alpha, **temperatures)
        if loss == "weighted-kl"
        else MarginKL(model, **temperatures)
    )
    args = default_arguments(model, output)
    args.num_train_epochs, args.per_device_train_batch_size, args.seed = epochs, batch_size, seed
    args.learning_rate = args.learning_rate if learning_rate is None else learning_rate
    args.disable_tqdm = quiet
    name = Path(student).name if Path(student).exists() else student
    record = distill(model, data, chosen, args, output_dir=output, base_name=name).record
    return asdict(record), f"The student is in {output}, trained in {record.seconds:.0f} s."
