"""Which run is this: everything that was given to it, except a named list of what cannot matter.

A run that is started again compares what it was given with what is written down, value by value. Objects are told
apart by their state and their code, whatever they say of themselves on a card.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer_callback import ExportableState

from st_wkl.losses.options import field_default, options_of, shown
from st_wkl.models import model_revision
from st_wkl.training import dev
from st_wkl.training.checkpoints import dataset_fingerprint
from st_wkl.training.describe import Describer
from st_wkl.training.lora_config import default_config, has_adapter
from st_wkl.training.precision import name_of

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.base.training_args import BaseTrainingArguments
    from transformers import TrainerCallback

    from st_wkl.losses.scoring import Student
    from st_wkl.training.data import TrainingData

# Of the training arguments: what is logged and where, files, the Hub, machines, and memory at the same gradient.
_CANNOT_MATTER = frozenset(
    """
    output_dir do_train do_eval do_predict resume_from_checkpoint restore_callback_states_from_checkpoint
    logging_strategy logging_steps logging_first_step logging_dir log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id debug skip_memory_metrics
    save_only_model save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    use_cpu local_rank dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context torch_empty_cache_steps gradient_checkpointing
    activation_checkpointing fsdp fsdp_config ddp_bucket_cap_mb ddp_backend ddp_timeout ddp_find_unused_parameters
    ddp_broadcast_buffers ddp_static_graph per_device_eval_batch_size eval_accumulation_steps
    eval_do_concat_batches eval_use_gather_object prediction_loss_only include_for_metrics batch_eval_metrics
    bf16_full_eval fp16_full_eval
    """.split()  # noqa: SIM905
)
# What the record and the card always tell of the arguments; the others where they are not at their default.
_ALWAYS_TOLD = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "seed",
    "bf16",
    "fp16",
)
# What of an adapter's configuration says where it came from.
_ADAPTER_ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")


def matters(name: str) -> bool:
    """Tell whether a training argument can change what is learnt."""
    return name not in _CANNOT_MATTER and name not in dev.SELECTION_ARGUMENTS


def run_identity(
    *,
    student: Student,
    dataset: Any,
    data: TrainingData,
    loss: nn.Module,
    args: BaseTrainingArguments,
    lora: bool | LoraConfig,
    evaluator: BaseEvaluator | None,
    callbacks: Iterable[TrainerCallback],
    describe: Describer,
    save_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Return what decides the outcome of training, in JSON values."""
    adapted = bool(lora) or has_adapter(student)
    if lora is True and not has_adapter(student):
        lora = default_config(student)  # written out, since another version may have another default
    found = {
        "student": model_revision(student),  # type: ignore[arg-type]
        "dataset": dataset_fingerprint(dataset),
        "columns": data.rows.column_names,
        "rows": data.count,
        "loss": describe.part("loss", loss),
        "arguments": {**_arguments(args, describe), "processes": args.world_size},
        "dev": None if evaluator is None else dev.identity(evaluator, args, describe),
        "lora": _adapter(lora, describe) if adapted and not isinstance(lora, bool) else adapted,
        "save_dtype": None if save_dtype is None else name_of(save_dtype),
        "callbacks": [_callback(callback, describe) for callback in callbacks if _takes_part(callback)],
    }
    if data.count is None:  # worker processes share an iterable dataset out among them
        found["workers"] = args.dataloader_num_workers
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def told_arguments(args: BaseTrainingArguments, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what the record tells of the arguments: the most important ones, and what is not at its default."""
    always = {name: getattr(args, name) for name in _ALWAYS_TOLD}
    others = {
        name: getattr(args, name) for name in identity["arguments"]["options"] if name not in (*always, "prompts")
    }
    return {name: shown(getattr(value, "value", value)) for name, value in (always | others).items()}


def told_options(loss: nn.Module) -> dict[str, Any]:
    """Return the parameters of a loss and of those that it wraps, for the record and the card."""
    describe: Callable[[], dict[str, Any]] | None = getattr(loss, "get_config_dict", None)  # type: ignore[assignment]
    config = {**({} if describe is None else describe()), **options_of(loss)}
    inner = {name: part for name, part in config.items() if isinstance(part, nn.Module)}
    wrapped = {name: {"name": type(part).__name__, **told_options(part)} for name, part in inner.items()}
    return {name: wrapped.get(name, value) for name, value in config.items()}


def _arguments(args: BaseTrainingArguments, describe: Describer) -> dict[str, Any]:
    """Describe the training arguments that can matter, those at the default of their class apart from the others."""
    options: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for entry in dataclasses.fields(args):
        if not matters(entry.name):
            continue
        value = describe.part(f"arguments.{entry.name}", getattr(args, entry.name))
        default = _or_none(describe(field_default(entry)))
        # The class completes what it was given: None becomes an object of settings at their defaults.
        at_default = isinstance(value, dict) and value.get("options") == {} and default is None
        (defaults if at_default or _or_none(value) == default else options)[entry.name] = value
    return {"class": type(args).__name__, "options": options, "defaults": defaults}


def _takes_part(callback: TrainerCallback) -> bool:
    """Tell whether a callback has a say in training and not only looks on: it has a state that checkpoints keep."""
    return isinstance(callback, ExportableState) or hasattr(callback, "run_identity")


def _callback(callback: Any, describe: Describer) -> Any:
    if hasattr(callback, "run_identity"):
        return {"class": type(callback).__name__, **callback.run_identity()}
    return {"class": type(callback).__name__, "args": describe(callback.state().get("args"))}


def _adapter(config: Any, describe: Describer) -> Any:
    found = describe(config)
    for part in ("options", "defaults"):
        found[part] = {name: value for name, value in found[part].items() if name not in _ADAPTER_ORIGIN}
    return found


def _or_none(value: Any) -> Any:
    return None if value is False or value in ("", [], {}) else value
