"""Which run is this: everything that was given to it, except a named list of what cannot matter.

A run that is started again compares what it was given with what is written down, value by value. Objects are told
apart by their state and their code, whatever they say of themselves on a card.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import sys
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState

from st_wkl.files import content_hash
from st_wkl.losses.options import constructor_defaults, field_default, options_of, shown
from st_wkl.models import model_revision
from st_wkl.training.dev import SELECTION_ARGUMENTS
from st_wkl.training.lora import default_config, has_adapter
from st_wkl.training.students import name_of

if TYPE_CHECKING:
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.base.training_args import BaseTrainingArguments

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
_ALWAYS_TOLD = """
    num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type
    warmup_steps weight_decay max_grad_norm optim seed bf16 fp16
""".split()  # noqa: SIM905
# What of an adapter's configuration says where it came from.
_ADAPTER_ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
# What using an object leaves on it.
_LEFT_BY_USE = re.compile(
    r"_checked_\w+|_logged|rows_without_\w+|batches_without_\w+|observer|cache|random_states|training|primary_metric|history"
)
_BARE_MODULE = frozenset(vars(nn.Module()))
# Their code is known by the versions of their packages.
_PACKAGES = {"accelerate", "datasets", "numpy", "peft", "sentence_transformers", "st_wkl", "torch", "transformers"}
_NOT_CODE = re.compile(r"__(?!init__|call__)\w+__|_abc_impl")


def matters(name: str) -> bool:
    """Tell whether a training argument can change what is learnt."""
    return name not in _CANNOT_MATTER and name not in SELECTION_ARGUMENTS


def run_identity(run: Any, data: TrainingData, describe: Describer) -> dict[str, Any]:
    """Return what decides the outcome of a run (its student, dataset, loss, arguments, …), in JSON values."""
    student, args, lora = run.student, run.args, run.lora
    adapted = bool(lora) or has_adapter(student)
    if lora is True and not has_adapter(student):
        lora = default_config(student)  # written out, since another version may have another default
    found = {
        "student": model_revision(student),
        "dataset": _of_each(run.dataset, dataset_fingerprint),
        "columns": _of_each(data.rows, lambda rows: rows.column_names),
        "rows": data.count,
        "loss": describe.part("loss", run.loss),
        "arguments": {**_arguments(args, describe), "processes": args.world_size},
        "dev": None if run.evaluator is None else _dev(run.evaluator, args, describe),
        "lora": _adapter(lora, describe) if adapted and not isinstance(lora, bool) else adapted,
        "save_dtype": None if run.rounded is None else name_of(run.rounded),
        "callbacks": _callbacks(run.callbacks, describe),
    }
    if isinstance(run.dataset, dict):
        found["datasets"] = list(run.dataset)  # their order is that of the draws
    frozen = [name for name, weight in student.named_parameters() if not weight.requires_grad]
    if frozen and not adapted:  # runs of before know none
        found["frozen"] = content_hash(sorted(frozen), size=16)
    if run.draws:  # likewise
        found["draws"] = run.draws
    if data.count is None:  # worker processes share an iterable dataset out among them
        found["workers"] = args.dataloader_num_workers
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _of_each(found: Any, what: Callable[[Any], Any]) -> Any:
    """Return something of a dataset, or of each of several by their names."""
    return {name: what(part) for name, part in found.items()} if isinstance(found, dict) else what(found)


def dataset_fingerprint(dataset: Any) -> str:
    """Return a hash of all rows in their order; of an iterable dataset's columns only, as its rows pass once.

    Rows that a transform makes as they are asked for are hashed as they are at this moment.
    """
    digest = hashlib.blake2b(digest_size=16)
    # The tables of a distillation dataset hold each document once, its lists many times.
    tables = [dataset] if hasattr(dataset, "column_names") else [dataset.train, dataset.queries, dataset.documents]
    for table in tables:
        digest.update(repr(sorted(table.column_names or [])).encode())
        if hasattr(table, "with_format") and hasattr(table, "__len__"):
            rows = table if table.format["type"] == "custom" else table.with_format(None)
            for batch in rows.iter(batch_size=1000):
                digest.update(json.dumps(batch, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def told_arguments(args: BaseTrainingArguments, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what the record tells of the arguments: the most important ones, and what is not at its default."""
    names = [*_ALWAYS_TOLD, *(name for name in identity["arguments"]["options"] if name != "prompts")]
    names += ["multi_dataset_batch_sampler"] if "datasets" in identity else []
    values = {name: getattr(args, name) for name in names}
    return {name: shown(getattr(value, "value", value)) for name, value in values.items()}


def told_options(loss: nn.Module) -> dict[str, Any]:
    """Return the parameters of a loss and of those that it wraps, for the record and the card."""
    describe: Any = getattr(loss, "get_config_dict", dict)
    config = {**describe(), **options_of(loss)}
    if isinstance(config.get("loss"), str) and hasattr(loss, "loss"):  # of which MatryoshkaLoss tells the name alone
        config["loss"] = loss.loss
    return {
        name: {"name": type(part).__name__, **told_options(part)} if isinstance(part, nn.Module) else part
        for name, part in config.items()
    }


def told_losses(loss: nn.Module | Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return what the record tells of the loss, or of those of several datasets by their names."""
    losses = list(loss.values()) if isinstance(loss, Mapping) else [loss]
    config = told_options(loss) if isinstance(loss, nn.Module) else {}
    if isinstance(loss, Mapping):
        config = {name: {"name": type(part).__name__, **told_options(part)} for name, part in loss.items()}
    citations = dict.fromkeys(str(getattr(part, "citation", "")) for part in losses)
    return {
        "loss": ", ".join(dict.fromkeys(type(part).__name__ for part in losses)),
        "loss_config": config,
        "loss_citation": "\n".join(filter(None, citations)),
    }


def _arguments(args: BaseTrainingArguments, describe: Describer) -> dict[str, Any]:
    """Describe the training arguments that can matter, those at the default of their class apart from the others."""

    def or_none(value: Any) -> Any:
        return None if value is False or value in ("", [], {}) else value

    options: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for entry in dataclasses.fields(args):
        if not matters(entry.name):
            continue
        value = describe.part(f"arguments.{entry.name}", getattr(args, entry.name))
        default = or_none(describe(field_default(entry)))
        # The class completes what it was given: None becomes an object of settings at their defaults.
        at_default = isinstance(value, dict) and value.get("options") == {} and default is None
        (defaults if at_default or or_none(value) == default else options)[entry.name] = value
    return {"class": type(args).__name__, "options": options, "defaults": defaults}


def _dev(evaluator: BaseEvaluator, args: BaseTrainingArguments, describe: Describer) -> dict[str, Any]:
    """Describe what decides which checkpoint is kept."""
    fingerprint = getattr(evaluator, "fingerprint", None)
    return {
        "evaluator": type(evaluator).__name__,
        "metric": evaluator.primary_metric,
        "fingerprint": fingerprint or content_hash(describe.part("dev", evaluator), size=16),
        **{name: describe(getattr(args, name)) for name in SELECTION_ARGUMENTS},
    }


def _callbacks(callbacks: Iterable[Any], describe: Describer) -> list[Any]:
    """Describe those that have a say in training and do not only look on: they have a state that checkpoints keep."""
    found = []
    for callback in callbacks:
        if hasattr(callback, "run_identity"):
            found.append({"class": type(callback).__name__, **callback.run_identity()})
        elif isinstance(callback, ExportableState):
            found.append({"class": type(callback).__name__, "args": describe(callback.state().get("args"))})
    return found


def _adapter(config: Any, describe: Describer) -> Any:
    found = describe(config)
    for part in ("options", "defaults"):
        found[part] = {name: value for name, value in found[part].items() if name not in _ADAPTER_ORIGIN}
    return found


def _is_known(module: str | None) -> bool:
    """Tell whether a module's code is told by the version of a package."""
    home = (module or "builtins").partition(".")[0]
    return home != "__main__" and (home in _PACKAGES or home in sys.stdlib_module_names)


# What options of this package were called in the release before.
_RENAMED = {"temperature": "student_temperature"}


def _without_home(kind: Any) -> Any:
    """Return the name of a class; where one of this package lies in it is no part of what it does."""
    return re.sub(r"^st_wkl\.(\w+\.)+", "", kind) if isinstance(kind, str) else kind


def differences(there: Any, now: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Compare two descriptions: path to the two values of what differs. An option that one lacks has its default."""
    if not (isinstance(there, dict) and isinstance(now, dict)):
        return {} if there == now else {path: (there, now)}
    if _without_home(there.get("class")) != _without_home(now.get("class")):
        return {path: (there.get("class", there), now.get("class", now))}
    found: dict[str, tuple[Any, Any]] = {}
    if "options" in there and "options" in now:
        both = [{**side["defaults"], **side["options"]} for side in (there, now)]
        sides = [{_RENAMED.get(name, name): value for name, value in side.items()} for side in both]
        for name in sorted(sides[0].keys() | sides[1].keys()):
            lacking = [name not in side for side in sides]
            if any(lacking) and name in (now if lacking[0] else there)["defaults"]:
                continue
            found |= differences(sides[0].get(name), sides[1].get(name), f"{path}.{name}".lstrip("."))
    for name in sorted((there.keys() | now.keys()) - {"class", "options", "defaults"}):
        found |= differences(there.get(name), now.get(name), f"{path}.{name}".lstrip("."))
    return found


def told(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Say in one line what differs, grouped by the part of the run."""
    groups: dict[str, list[str]] = {}
    for path, values in found.items():
        part, _, rest = path.partition(".")
        old, new = (text if len(text) <= 200 else f"{text[:200]}…" for text in map(json.dumps, values))
        groups.setdefault(part, []).append(f"{rest} {old} there, {new} now".lstrip())
    return "; ".join(f"{part}: {', '.join(items)}" for part, items in groups.items())


class Describer:
    """Turns values into JSON that is equal if and only if the values would do the same.

    Args:
        student: What stands for itself wherever it is met.

    `unknown` gathers the places of what cannot be told apart from another of its kind; it is described as nothing else
    ever is.
    """

    def __init__(self, student: nn.Module | None = None) -> None:
        self.student = student
        self.unknown: list[str] = []
        self._path: list[str] = []
        self._open: list[int] = []

    def __call__(self, value: Any) -> Any:
        """Describe a value."""
        if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, Enum)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else f"float {value}"
        if value is self.student:
            return "the student"
        if id(value) in self._open:
            return "see above"
        self._open.append(id(value))
        try:
            return self._plain(value)
        finally:
            self._open.pop()

    def part(self, name: Any, value: Any) -> Any:
        """Describe a part of the run, by whose name `unknown` calls what is in it."""
        self._path.append(str(name))
        try:
            return self(value)
        finally:
            self._path.pop()

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value if isinstance(value.value, (str, int)) else value.name
        if isinstance(value, Mapping):
            return {str(key): self.part(key, item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.part(number, item) for number, item in enumerate(value)]
        if isinstance(value, (set, frozenset)):
            return sorted((self(item) for item in value), key=repr)
        if isinstance(value, np.generic):
            return self(value.item())
        if isinstance(value, (Tensor, np.ndarray)):
            return _array(value)
        if isinstance(value, (Path, torch.dtype, re.Pattern, bytes, complex, range, slice)):
            return f"{type(value).__name__} {value!r}"
        return "a device" if isinstance(value, torch.device) else self._code_or_object(value)

    def _code_or_object(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, functools.partial):
            return {"class": "partial", **{name: self(getattr(value, name)) for name in ("func", "args", "keywords")}}
        if isinstance(value, types.MethodType):
            return {"class": "method", "of": self(value.__self__), "name": self(value.__func__)}
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.BuiltinFunctionType) or type(value).__name__ == "method_descriptor":
            return f"{value.__module__ or ''}.{value.__qualname__}".lstrip(".")
        return self._object(value)

    def _function(self, function: types.FunctionType) -> Any:
        name = f"{function.__module__}.{function.__qualname__}"
        if _is_known(function.__module__) and "<" not in name:
            return name
        code = function.__code__
        named = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
        around = [function.__defaults__, function.__kwdefaults__, *map(_content, function.__closure__ or ())]
        return {"class": name, "code": _code(code), "around": self(around), "globals": self(named)}

    def _class(self, kind: type) -> Any:
        own = [part for part in kind.__mro__ if not _is_known(part.__module__)]
        members = [
            self({key: _bare(item) for key, item in sorted(vars(part).items()) if not _NOT_CODE.fullmatch(key)})
            for part in own
        ]
        name = f"{kind.__module__}.{kind.__qualname__}"
        return f"{name} {content_hash(members, size=8)}" if own else name

    def _object(self, value: Any) -> Any:
        """Describe an object by its class and state, apart where it has the value that its constructor gives it."""
        if isinstance(value, nn.Module) and hasattr(value, "model_card_data"):
            return {"class": type(value).__name__, "model": model_revision(value)}  # type: ignore[arg-type]
        if hasattr(value, "run_identity"):
            return {"class": type(value).__name__, **self(value.run_identity())}
        if not hasattr(value, "__dict__"):
            self.unknown.append(".".join(self._path) or type(value).__name__)
            return {"class": type(value).__name__, "unlike any other": uuid.uuid4().hex}
        state = {name: item for name, item in vars(value).items() if not _LEFT_BY_USE.fullmatch(name)}
        if isinstance(value, nn.Module):
            state = {name: item for name, item in state.items() if name not in _BARE_MODULE}
            state |= dict(value.named_parameters(recurse=False)) | dict(value.named_buffers(recurse=False))
            state |= value._modules  # every child, also one that stands at two places
        signature = constructor_defaults(type(value))
        options: dict[str, Any] = {}
        defaults: dict[str, Any] = {}
        for name, item in state.items():
            found = self.part(name, item)
            at_default = name in signature and found == Describer(self.student)(signature[name])
            (defaults if at_default else options)[name] = found
        return {"class": self(type(value)), "options": options, "defaults": defaults}


def _array(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        data = repr(value.tolist()).encode()
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return {"class": str(value.dtype), "shape": list(value.shape), "hash": digest}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "nothing yet"


def _code(code: types.CodeType) -> str:
    """Return a hash of what a function does, wherever it stands and however it is laid out."""
    digest = hashlib.blake2b(code.co_code, digest_size=16)
    digest.update(repr((code.co_names, code.co_argcount, code.co_kwonlyargcount, code.co_flags)).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            digest.update(_code(constant).encode())
        else:
            digest.update(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode())
    return digest.hexdigest()


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _bare(item: Any) -> Any:
    """Return the function inside of what a class makes of one."""
    return item.fget if isinstance(item, property) else getattr(item, "__func__", item)
