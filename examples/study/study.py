"""The study: does weighted KL beat KL, and what should a small retriever learn from a reranker?

Run the stages in this order; each skips what is there, so a stopped one goes on where it was:

    python examples/study/study.py score   --data FOLDER    teacher scores, kept as ids and numbers in scores/
    python examples/study/study.py tune    --data FOLDER    the same small grid for every method, on dev queries
    python examples/study/study.py final   --data FOLDER    the main table: all methods, all seeds, test queries
    python examples/study/study.py analyse --data FOLDER    one thing varied at a time
    python examples/study/study.py report  --data FOLDER    one tidy file, tables and figures from the finished runs
    python examples/study/study.py check                    are these the published numbers?

FOLDER holds the collections of study.yaml as BEIR folders. `final` takes the settings of published/study/tuned.json
unless `tune` has found others in the same --output. `--config minilm.yaml` does the same for a transformer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
PUBLISHED = Path(__file__).parent / "published"


def temperatures(config: dict[str, Any], method: str) -> list[tuple[float, float]]:
    """Return the temperatures of student and teacher that a method tries."""
    grid = [tuple(pair) for pair in config["tuning"]["temperatures"]]
    ratio = config["methods"][method].get("teacher_over_student")
    return grid if ratio is None else list(dict.fromkeys((first, first * ratio) for first, _ in grid))


def base_run(config: dict[str, Any], name: str, method: str) -> Any:
    from runs import Run

    parameters = dict(config["methods"][method])
    loss, teacher = parameters.pop("loss"), parameters.pop("teacher", "cross-encoder")
    parameters.pop("teacher_over_student", None)
    student_temperature, teacher_temperature = temperatures(config, method)[0]
    student = config["student"]
    return Run(
        collection=name,
        method=method,
        seed=config["tuning"]["seed"],
        learning_rate=config["tuning"]["learning_rate"][0],
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        epochs=config["collections"][name]["epochs"],
        batch_size=student["batch_size"],
        negatives=config["negatives"],
        student=student["name"],
        max_length=student.get("max_length"),
        bf16=student.get("bf16", False),
        loss=loss,
        teacher=teacher,
        parameters=tuple(sorted(parameters.items())),
    )


def tuning_runs(config: dict[str, Any], output: Path) -> list[Any]:
    """Return the runs of the grid: every learning rate, then, where those are done, every temperature at the best."""
    from runs import TEMPERATURES, done

    grid, runs = config["tuning"], []
    for name, method in itertools.product(config["collections"], config["methods"]):
        if config["collections"][name]["tuned_on"] != name:
            continue
        dev = config["collections"][name]["dev"]
        base = replace(base_run(config, name, method), fold=None if dev else 0, evaluated_on=dev or "held out")
        rates = [replace(base, learning_rate=rate) for rate in grid["learning_rate"]]
        runs += rates
        if len(found := list(done(output, rates))) == len(rates):
            best, _ = max(found, key=lambda pair: mean(pair[1][name].values()))
            heard = TEMPERATURES.get(base.loss, 2) or int("in_batch" in dict(base.parameters))
            names = ("student_temperature", "teacher_temperature")[:heard]
            tried = temperatures(config, method)
            runs += [replace(best, **dict(zip(names, values, strict=False))) for values in tried]
    return list(dict.fromkeys(runs))


def tuned(config: dict[str, Any], output: Path) -> dict[tuple[str, str], Any]:
    """Return the best setting of each collection and method on the dev queries, ready for the test queries."""
    file = output / "tuned.json"
    settings = json.loads((file if file.is_file() else config["published"] / "tuned.json").read_text(encoding="utf-8"))
    source = {name: options["tuned_on"] for name, options in config["collections"].items()}
    return {
        (name, method): replace(base_run(config, name, method), **settings[source[name]][method])
        for name, method in itertools.product(config["collections"], config["methods"])
        if method in settings.get(source[name], {})
    }


def write_tuned(config: dict[str, Any], output: Path) -> None:
    """Write the best setting of each collection and method; other collections' settings stay."""
    from runs import done

    best: dict[tuple[str, str], tuple[float, Any]] = {}
    for run, scores in done(output, tuning_runs(config, output)):
        score = mean(scores[run.collection].values())
        if score > best.get((run.collection, run.method), (-1.0, None))[0]:
            best[run.collection, run.method] = (score, run)
    file = output / "tuned.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for (name, method), (_, run) in best.items():
        axes = ("learning_rate", "student_temperature", "teacher_temperature")
        settings.setdefault(name, {})[method] = {axis: getattr(run, axis) for axis in axes}
    write_text(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file in one step, so that a stopped study leaves none that is half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def final_runs(config: dict[str, Any], output: Path) -> list[Any]:
    settings = tuned(config, output)
    return [replace(run, seed=seed) for seed in config["final"]["seeds"] for run in settings.values()]


def analysis_runs(config: dict[str, Any], output: Path) -> dict[str, list[Any]]:
    """Return the runs of each analysis; those of one seed come before those of the next."""
    if "analyses" not in config:
        return {}
    options, settings = config["analyses"], tuned(config, output)
    found: dict[str, list[Any]] = {name: [] for name in options["collections"]}
    for name, collections in options["collections"].items():
        seeds = options.get(name, {}).get("seeds", options["seeds"])
        for seed, collection in itertools.product(seeds, collections):
            if (collection, "KL") not in settings:
                continue
            if name == "correctness":  # every training query is held out once, so the teacher's scores of it are known
                for method, fold in itertools.product(options["methods"], range(5)):
                    base = replace(settings[collection, method], seed=seed)
                    found[name].append(replace(base, fold=fold, evaluated_on="held out"))
                continue
            if name == "weights":
                base = replace(settings[collection, "KL"], seed=seed)
                for gamma, alpha in itertools.product(*options["weights"].values()):
                    parameters = (("alpha", alpha), ("detach_weights", False), ("gamma", gamma))
                    if alpha <= gamma:
                        found[name].append(replace(base, method=f"γ{gamma} α{alpha}", parameters=parameters))
                continue
            if name == "refresh":  # not refreshed are the runs of the main table
                base = replace(settings[collection, "KL"], seed=seed)
                parameters = (*base.parameters, ("refresh", options["refresh"]["every"]))
                found[name] += [base, replace(base, method="KL, refreshed", parameters=parameters)]
                continue
            for method, values in itertools.product(options["methods"], itertools.product(*options[name].values())):
                change = dict(zip(options[name], values, strict=True))
                found[name].append(replace(settings[collection, method], seed=seed, **change))
    return found


def execute(job: tuple[Any, str, str, list[str]]) -> str:
    """Do one run and write its file."""
    run, data, output, others = job
    file = Path(output) / "runs" / f"{run.key}.json"
    if file.is_file():
        return ""
    import torch
    from runs import measure, train

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    try:
        scores = measure(run, train(run, data, Path(output) / "scores.sqlite3"), data, others)
    except Exception as error:  # one method that fails must not cost the others their hours
        traceback.print_exc()
        return f"FAILED: {run.collection} {run.method} seed {run.seed}: {error}"
    value = {"run": asdict(run), "seconds": round(time.perf_counter() - start, 1), "scores": scores}
    write_text(file, json.dumps(value, ensure_ascii=False))
    return f"{run.collection} {run.method} seed {run.seed}: {mean(scores[run.collection].values()):.4f}"


def execute_all(runs: list[Any], data: str, output: Path, others: list[str], workers: int) -> None:
    """Do all runs that are not done, some at a time, each on one core."""
    from tqdm.auto import tqdm

    (output / "runs").mkdir(parents=True, exist_ok=True)
    runs = list(dict.fromkeys(runs))
    jobs = [(run, data, str(output), others) for run in runs if not (output / "runs" / f"{run.key}.json").is_file()]
    print(f"{len(runs) - len(jobs)} of {len(runs)} runs are there already.", file=sys.stderr)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    failed = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool, tqdm(total=len(jobs), unit="run") as bar:
        for line in pool.imap_unordered(execute, jobs):
            bar.set_postfix_str(line)
            bar.update()
            failed += [line] if line.startswith("FAILED") else []
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} of {len(jobs)} runs failed; the others are kept.", *failed]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["score", "tune", "final", "analyse", "report", "check"])
    parser.add_argument("--data", help="folder of BEIR folders")
    parser.add_argument("--output", type=Path, default=Path("study-output"), help="where runs and results go")
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "study.yaml")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--collections", nargs="*", help="only these")
    parser.add_argument("--analyses", nargs="*", help="only these; `refresh` asks the teacher anew, for half an hour")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    config["published"] = PUBLISHED / options.config.stem
    others = [*config["collections"], *config["transfer_to"]]
    if options.collections:
        config["collections"] = {name: config["collections"][name] for name in options.collections}
    if options.stage == "check":
        from report import check

        sys.exit(check(options.output / "results.csv", config["published"] / "results.csv"))
    if not (options.data and Path(options.data).is_dir()):
        parser.error(f"--data must be a folder with the BEIR folders {', '.join(config['collections'])}")
    if options.stage == "score":
        from scoring import score

        for name in config["collections"]:
            score(name, config, options.data, options.output)
    elif options.stage == "tune":
        for _ in ("learning rates", "temperatures"):
            runs = tuning_runs(config, options.output)
            execute_all(runs, options.data, options.output, [], options.workers)
        write_tuned(config, options.output)
    elif options.stage == "final":
        execute_all(final_runs(config, options.output), options.data, options.output, others, options.workers)
    elif options.stage == "analyse":
        analyses = analysis_runs(config, options.output)
        runs = [run for name in options.analyses or analyses for run in analyses[name]]
        execute_all(runs, options.data, options.output, [], options.workers)
    else:
        from report import report

        report(config, options.data, options.output)


if __name__ == "__main__":
    main()
