"""The study from start to end: data, tuning, seeds, judging; what is done already is left alone.

SFT comes first. DPO starts from the model that plain SFT made with the first seed. Whatever fails,
the rest goes on; :meth:`Study.remarks` says what is missing for it.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml

from axolotl_gmt.tools import quickstart
from axolotl_gmt.tools.checkpoint import FLOATS, read_json, read_tensors
from axolotl_gmt.tools.scoring import check_model_folder
from benchmarks.study import data as sources
from benchmarks.study import grid, sums
from benchmarks.study.cell import (
    CellFolder,
    DataFiles,
    Scoring,
    Untrained,
    run_cell,
    score_reference,
    test_sft,
    write_replies,
)
from benchmarks.study.data import DataError, write_text
from benchmarks.study.grid import FULL, Cell, Method, Size, Task
from benchmarks.study.running import Job, Runner, fitting
from benchmarks.study.tables import COLUMNS, Row

# How long a job takes beside others, for the progress bar.
_TRAIN, _TEST = 1.0, 0.6


class Study:
    """One study in one folder.

    Args:
        size: What to run.
        source: Folder with ``train.jsonl``, ``test.jsonl`` and ``preferences.jsonl``.
        out: Everything is written here.
        plan: Called with the weight of jobs that are going to run, negative for those that turn
            out to be done already.
        base: Folder of the untrained model; None for the quickstart's.
        by_memory: Whether as many cells run at a time as the GPU has memory for, judging by those
            that ran, and up to the runner's ``parallel``.
    """

    def __init__(
        self,
        size: Size,
        source: Path,
        out: Path,
        plan: Callable[[float], object],
        base: Path | None = None,
        by_memory: bool = False,
    ) -> None:
        self.size = size
        self.source = source
        self.out = out.resolve()
        self.plan = plan
        self.quickstart = quickstart.Folder(self.out / "quickstart")
        self.is_quickstart = base is None
        self.base = self.quickstart.base_model if base is None else base.resolve()
        self.by_memory = by_memory
        self.data = DataFiles(self.out / "data")
        self.scoring = Scoring(size.replies, size.max_new_tokens, size.prose_tokens)
        self.parameters = 0
        self.hashes: dict[str, str] = {}
        """``data`` and ``model``, once it is prepared."""
        self.examples: dict[str, int] = {}
        """How many each file of data has."""
        self._best: dict[grid.TaskName, dict[Method, Cell]] = {"sft": {}, "dpo": {}}

    def prepare(self, report: Callable[[str], None]) -> None:
        """Write the quickstart's model, if that is wanted and not there, and the data.

        Raises:
            DataError: If the model, the data folder or the output folder cannot be used.
            axolotl_gmt.errors.UserError: If the model is no model, its package is missing, or the
                disk is full.
        """
        holds_study = self.quickstart.path.is_dir() or self.data.folder.is_dir()
        if self.out.is_dir() and any(self.out.iterdir()) and not holds_study:
            raise DataError(f"{self.out} is not empty and holds no study. Name another --out.")
        if self.is_quickstart:
            quickstart.prepare(self.quickstart, report)
        self.parameters = check_base(self.base, self.size.parameters)
        count = token_counter(self.base)
        sft, dpo = self.size.sft, self.size.dpo
        problems = sources.split_problems(
            self.source, count, sft.max_tokens, sft.validation, sft.test
        )
        pairs = sources.split_preferences(
            self.source, count, dpo.max_tokens, dpo.validation, dpo.test
        )
        for task, found in ((sft, len(problems.train)), (dpo, len(pairs.train))):
            if found < task.steps * task.batch:
                raise DataError(
                    f"{self.source} leaves {found} examples to train {task.name} on, but "
                    f"{task.steps * task.batch} are needed. Use the whole data set."
                )
        for split in ("train", "validation", "test"):
            for file, splits in ((self.data.sft(split), problems), (self.data.dpo(split), pairs)):
                examples = getattr(splits, split)
                sources.write_jsonl(file, (example.row() for example in examples))
                self.examples[file.stem] = len(examples)
        write_text(self.data.prose, json.dumps(sources.prose()))
        self.hashes = {
            "data": sources.digest(self.data.all()),
            "model": sources.sha256(sorted(self.base.glob("*.safetensors"))),
        }

    # Cells and their folders

    def key(self, cell: Cell) -> str:
        """A hash of all that the cell's results depend on."""
        start = () if cell.task == "sft" else (self.key(self._known_start),)
        return grid.key(cell, self.size, *self._origins, *start)

    @property
    def _origins(self) -> tuple[str, ...]:
        """Hashes of what every cell starts from."""
        data = self.hashes.get("data", "")
        return (data,) if self.is_quickstart else (data, self.hashes.get("model", ""))

    def folder(self, cell: Cell) -> CellFolder:
        """Where a cell lives. Cells of other settings have other folders."""
        return CellFolder(self.out / "cells" / f"{cell.label}-{self.key(cell)}")

    @property
    def base_folder(self) -> CellFolder:
        """Where the scores of the untrained model are."""
        key = grid.short_hash(*self._origins, repr(self.scoring))
        return CellFolder(self.out / "cells" / f"base-{key}")

    @property
    def untrained(self) -> Untrained | None:
        """What forgetting is measured against, if it is."""
        if not self.size.reply_tokens:
            return None
        key = grid.short_hash(*self._origins, str(self.size.reply_tokens))
        return Untrained(self.base, self.out / "cells" / f"replies-{key}" / "replies.json")

    @property
    def timing(self) -> Path:
        """What GMT adds to a step."""
        key = grid.short_hash(*self._origins, repr((self.size.sft.batch, self.size.timed_pairs)))
        return self.out / "cells" / f"timing-{key}" / "timing.json"

    @property
    def _start(self) -> Cell | None:
        """The SFT cell whose model DPO starts from, which is kept; None if full failed."""
        best = self._best["sft"].get(FULL)
        return best and replace(best, seed=self.size.seeds[0])

    @property
    def _known_start(self) -> Cell:
        start = self._start
        assert start is not None, "DPO has no model to start from"
        return start

    @property
    def _reference(self) -> Path:
        return self.folder(self._known_start).path / "reference.json"

    def recipe(self, cell: Cell) -> grid.Yaml:
        """The whole YAML of a cell."""
        if cell.task == "sft":
            base, train, kind = self.base, self.data.sft("train"), "chat_template"
            fields = {"field_messages": "messages"}
        else:
            base, train = self.folder(self._known_start).model, self.data.dpo("train")
            kind = "chat_template.default"
            fields = {
                "field_messages": "messages",
                "field_chosen": "chosen",
                "field_rejected": "rejected",
            }
        return {
            "base_model": str(base),
            **grid.settings(cell, self.size),
            "datasets": [{"path": str(train), "ds_type": "json", "type": kind, **fields}],
            "dataset_prepared_path": str(self.folder(cell).prepared),
            "output_dir": str(self.folder(cell).model),
        }

    # The run

    def run(self, runner: Runner) -> None:
        """Run every cell that is not done; those that fail are in ``runner.failed``."""
        for task in (self.size.sft, self.size.dpo):
            tuning, judged, both = self.size.counts(task)
            self.plan((tuning + judged - both) * _TRAIN + judged * _TEST)
        for job in self._lone_jobs():
            runner.run([job])
        self._run_task(self.size.sft, runner, self._base_jobs())
        if self._start is not None:
            for job in self._start_jobs():
                runner.run([job])
                if not job.result.is_file():  # The second needs the first.
                    break
            if self._reference.is_file():
                self._run_task(self.size.dpo, runner, [])

    def remarks(self) -> list[str]:
        """What is missing, and what was not done for it; and chosen rates at the grid's edge."""
        found = []
        if not self.base_folder.tested.is_file():
            found.append("The untrained model was not scored.")
        if self.untrained is not None and not self.untrained.replies.is_file():
            found.append("KL from untrained was not measured: the replies could not be written.")
        if self.size.timed_pairs and not self.timing.is_file():
            found.append("The time of a step was not measured.")
        for task in (self.size.sft, self.size.dpo):
            if task.name == "dpo" and (self._start is None or not self._reference.is_file()):
                found.append(
                    "DPO was not run: it starts from the model of full fine-tuning with seed "
                    f"{self.size.seeds[0]}, which is missing or could not be scored."
                )
                continue
            tuned = self._tuning(task)
            for method in task.methods:
                best = self._best[task.name].get(method)
                rates = {cell.learning_rate for cell in tuned if cell.method == method}
                if best is None:
                    found.append(
                        f"{task.name} {method.label} has no learning rate: a cell that tunes it "
                        "failed, or all losses are NaN."
                    )
                elif best.learning_rate in (min(rates), max(rates)):
                    found.append(
                        f"The learning rate of {task.name} {method.label}, {best.learning_rate:g}, "
                        "is at the edge of what was tried."
                    )
        return found

    def _lone_jobs(self) -> list[Job]:
        """What nothing may run beside, or what others need."""
        jobs = []
        untrained, timing = self.untrained, self.timing
        if self.size.timed_pairs and not timing.is_file():
            from benchmarks.study.timing import time_steps

            arguments: dict[str, Any] = {
                "model": self.base,
                "chats": self.data.sft("train"),
                "batch": self.size.sft.batch,
                "autocast": self.size.autocast,
                "pairs": self.size.timed_pairs,
                "result": timing,
            }
            log = timing.with_name("log.txt")
            jobs.append(Job("time of a step", time_steps, arguments, timing, log, _TEST))
        if untrained is not None and not untrained.replies.is_file():
            prompts = Path(sums.__file__).with_name("prompts.txt").read_text(encoding="utf-8")
            arguments = {
                "model": self.base,
                "prompts": prompts.splitlines(),
                "new_tokens": self.size.reply_tokens,
                "file": untrained.replies,
            }
            log = untrained.replies.with_name("log.txt")
            label = "replies of the untrained model"
            jobs.append(Job(label, write_replies, arguments, untrained.replies, log, _TEST))
        self.plan(sum(job.weight for job in jobs))
        return jobs

    def _base_jobs(self) -> list[Job]:
        folder = self.base_folder
        if folder.tested.is_file():
            return []
        self.plan(_TEST)
        arguments = {
            "model": self.base,
            "data": self.data,
            "scoring": self.scoring,
            "file": folder.tested,
            "untrained": None,  # It is at no distance from itself.
        }
        return [Job("base model", test_sft, arguments, folder.tested, folder.log, _TEST)]

    def _start_jobs(self) -> list[Job]:
        """What DPO needs before its first cell: a model, and what it thinks of the pairs."""
        folder = self.folder(self._known_start)
        jobs = []
        if not quickstart.is_trained(folder.model):  # It failed, or somebody removed it.
            jobs.append(self._job(self._known_start, train=True, test=True))
        if not self._reference.is_file():
            arguments = {"model": folder.model, "data": self.data, "file": self._reference}
            label = "reference of DPO"
            jobs.append(Job(label, score_reference, arguments, self._reference, folder.log, _TEST))
        self.plan(sum(job.weight for job in jobs))
        return jobs

    def _run_task(self, task: Task, runner: Runner, first: list[Job]) -> None:
        """Tune each method, then train the chosen cells with the other seeds, and judge them."""
        coarse = grid.coarse_cells(task, self.size)
        self._run_cells(task, runner, self._jobs(dict.fromkeys(coarse, _TRAIN), test=False), first)
        tuning = self._tuning(task)
        finer = [cell for cell in tuning if cell not in coarse]
        self._run_cells(task, runner, self._jobs(dict.fromkeys(finer, _TRAIN), test=False))
        self._best[task.name] = grid.choose(self._losses_of_whole(tuning))
        final = self.final_cells(task)
        planned = {cell: _TEST if cell in tuning else _TRAIN + _TEST for cell in final}
        self._run_cells(task, runner, self._jobs(planned, test=True))

    def _run_cells(
        self, task: Task, runner: Runner, cells: Iterable[Job], first: Iterable[Job] = ()
    ) -> None:
        """Run jobs; on a GPU one alone until its memory is known, then as many as fit."""
        jobs = deque([*first, *cells])
        most, threads = runner.parallel, runner.threads
        while self.by_memory and jobs:
            memory = self._memory(task)
            if memory is not None:
                runner.parallel = fitting(*memory, most)
                break
            runner.parallel = 1
            runner.run([jobs.popleft()])
        runner.threads = max(1, threads * most // runner.parallel)
        runner.run(jobs)
        runner.parallel, runner.threads = most, threads

    def _memory(self, task: Task) -> tuple[int, int] | None:
        """The most bytes that a cell of the task reserved on the GPU, and the GPU's."""
        cells = [*self._tuning(task), *self.final_cells(task)]
        found = [_read(self.folder(cell).trained) for cell in cells]
        known = [(each["gpu_reserved"], each["gpu_total"]) for each in found if "gpu_total" in each]
        return max(known, default=None)

    def _tuning(self, task: Task) -> list[Cell]:
        """The cells that tune the methods, as far as the ones before say."""
        coarse = grid.coarse_cells(task, self.size)
        best = grid.choose(self._losses_of_whole(coarse))
        return list(dict.fromkeys([*coarse, *grid.finer_cells(best.values(), self.size)]))

    def final_cells(self, task: Task) -> list[Cell]:
        """The cells that the tables are made of; none before the learning rates are chosen."""
        return grid.seed_cells(self._best[task.name].values(), self.size)

    def _losses_of_whole(self, cells: Iterable[Cell]) -> dict[Cell, float]:
        """Validation losses of those methods of which all these cells have one.

        The others were not tuned alike.
        """
        found = {cell: self._validation_losses([cell]).get(cell) for cell in cells}
        broken = {cell.method for cell, loss in found.items() if loss is None}
        return {
            cell: loss
            for cell, loss in found.items()
            if loss is not None and cell.method not in broken
        }

    def _validation_losses(self, cells: Iterable[Cell]) -> dict[Cell, float]:
        files = {cell: self.folder(cell).trained for cell in cells}
        return {
            cell: json.loads(file.read_text())["validation_loss"]
            for cell, file in files.items()
            if file.is_file()
        }

    def _jobs(self, planned: Mapping[Cell, float], test: bool) -> list[Job]:
        """The jobs that are left of these cells, each with the weight that was planned for it."""
        jobs = []
        for cell, weight in planned.items():
            folder = self.folder(cell)
            trained = folder.trained.is_file()
            self.plan(-weight)
            if not trained or (test and not folder.tested.is_file()):
                train = not trained or not quickstart.is_trained(folder.model)
                jobs.append(self._job(cell, train, test))
                self.plan(jobs[-1].weight)
        return jobs

    def _job(self, cell: Cell, train: bool, test: bool) -> Job:
        folder = self.folder(cell)
        write_text(folder.recipe, yaml.safe_dump(self.recipe(cell), sort_keys=False))
        arguments = {
            "folder": folder,
            "data": self.data,
            "scoring": self.scoring,
            "reference": None if cell.task == "sft" else self._reference,
            "train": train,
            "test": test,
            "untrained": self.untrained if cell.task == "sft" else None,
        }
        result = folder.tested if test else folder.trained
        weight = train * _TRAIN + test * _TEST
        return Job(cell.label, run_cell, arguments, result, folder.log, weight)

    def tidy(self) -> None:
        """Remove models that nothing needs any more: they would fill the disk.

        While a method is tuned only its best model so far is kept, and that only if its seed counts
        too; later those not judged yet, and in the end the one that DPO starts from.
        """
        for task in (self.size.sft, self.size.dpo):
            if task.name == "dpo" and self._start is None:
                return
            losses = self._validation_losses(self._tuning(task))
            best = grid.choose(losses).values()
            kept = {cell for cell in best if cell.seed in self.size.seeds_of(cell.method)}
            tested = {c for c in self.final_cells(task) if self.folder(c).tested.is_file()}
            for cell in (losses.keys() - kept) | tested:
                if cell != self._start:
                    shutil.rmtree(self.folder(cell).model, ignore_errors=True)

    # What was found

    def rows(self) -> list[Row]:
        """One row for each cell, whether it succeeded or not, and one for the untrained model."""
        tested = _read(self.base_folder.tested)
        status = "done" if tested else "failed"
        rows: list[Row] = [
            {"task": "sft", "method": "base", "chosen": True, "status": status, **tested}
        ]
        for task in (self.size.sft, self.size.dpo):
            if task.name == "dpo" and self._start is None:
                continue
            final = self.final_cells(task)
            tuning = self._tuning(task)
            for cell in dict.fromkeys([*tuning, *final]):
                rows.append(self._row(cell, cell in final))
        return rows

    def _row(self, cell: Cell, chosen: bool) -> Row:
        folder = self.folder(cell)
        found = _read(folder.trained) | _read(folder.tested)
        logs = _read(folder.state).get("log_history", [])
        losses, fractions, norms = (
            [float(log[name]) for log in logs if name in log]
            for name in ("loss", "gmt/kept_fraction", "gmt/grad_norm_kept")
        )
        done = folder.trained.is_file() and (folder.tested.is_file() or not chosen)
        return {
            "task": cell.task,
            "method": cell.method.name,
            "ratio": cell.method.ratio,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "chosen": chosen,
            "status": "done" if done else "failed",
            **{column: found[column] for column in COLUMNS if column in found},
            "last_train_loss": losses[-1] if losses else None,
            "kept_fraction": statistics.mean(fractions) if fractions else None,
            "grad_norm_kept": statistics.mean(norms) if norms else None,
            "key": self.key(cell),
        }


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def check_base(folder: Path, allowed: tuple[float, float] | None) -> int:
    """Check an untrained model; returns the number of its parameters.

    Args:
        folder: A local folder.
        allowed: The fewest and the most parameters that it may have; None for any number.

    Raises:
        DataError: If it is quantised, or has more or fewer.
        axolotl_gmt.errors.UserError: If it is no model, or incomplete.
    """
    check_model_folder(folder)
    tensors = read_tensors(folder)
    dtypes = {tensor.dtype for tensor in tensors.values()} - {"I64", "BOOL"}  # These are buffers.
    if "quantization_config" in read_json(folder / "config.json") or not dtypes <= set(FLOATS):
        raise DataError(
            f"{folder} is quantised ({', '.join(sorted(dtypes))}). --base-model needs weights in "
            "float32, bfloat16 or float16."
        )
    parameters = sum(tensor.entries for tensor in tensors.values() if tensor.dtype in FLOATS)
    least, most = allowed or (0, float("inf"))
    if not least <= parameters <= most:
        raise DataError(
            f"{folder} has {parameters:,} parameters. --base-model needs {least:,.0f} to "
            f"{most:,.0f} at this --size."
        )
    return parameters


def token_counter(model: Path) -> sources.CountTokens:
    """Counts the tokens of a question and its answer as a chat of the model in this folder.

    Raises:
        DataError: If it has no tokenizer, or its tokenizer no chat template.
    """
    from transformers import AutoTokenizer

    from benchmarks.study.scoring import encode

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"The tokenizer of {model} cannot be loaded: {error}") from None
    if tokenizer.chat_template is None:
        raise DataError(f"{model} has no chat template. --base-model needs a model that chats.")

    def count(question: str, answer: str) -> int:
        row = sources.Problem(question, answer).row()
        prompt, reply = encode(tokenizer, cast(list[sources.Turn], row["messages"]))
        return len(prompt) + len(reply)

    return count
