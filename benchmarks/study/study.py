"""The study from start to end: data, tuning, seeds, judging; what is done already is left alone.

SFT comes first. DPO starts from the model that plain SFT made with the first seed.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from axolotl_gmt.tools import quickstart
from benchmarks.study import data as sources
from benchmarks.study import grid
from benchmarks.study.cell import (
    CellFolder,
    DataFiles,
    Scoring,
    run_cell,
    score_reference,
    test_sft,
)
from benchmarks.study.data import DataError, write_text
from benchmarks.study.grid import FULL, Cell, Method, Size, Task
from benchmarks.study.running import Job, Runner
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
    """

    def __init__(
        self,
        size: Size,
        source: Path,
        out: Path,
        plan: Callable[[float], object],
    ) -> None:
        self.size = size
        self.source = source
        self.out = out.resolve()
        self.plan = plan
        self.quickstart = quickstart.Folder(self.out / "quickstart")
        self.base = self.quickstart.base_model
        self.data = DataFiles(self.out / "data")
        self.scoring = Scoring(size.replies, size.max_new_tokens, size.prose_tokens)
        self._digest = ""
        self._best: dict[grid.TaskName, dict[Method, Cell]] = {"sft": {}, "dpo": {}}

    def prepare(self, report: Callable[[str], None]) -> None:
        """Write the quickstart's model, if it is not there, and the data.

        Raises:
            DataError: If the data folder or the output folder cannot be used.
            axolotl_gmt.errors.UserError: If the model's package is missing, or the disk is full.
        """
        if self.out.is_dir() and any(self.out.iterdir()) and not self.quickstart.path.is_dir():
            raise DataError(f"{self.out} is not empty and holds no study. Name another --out.")
        quickstart.prepare(self.quickstart, report)
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
                sources.write_jsonl(file, (example.row() for example in getattr(splits, split)))
        write_text(self.data.prose, json.dumps(sources.prose()))
        self._digest = sources.digest(self.data.all())

    # Cells and their folders

    def key(self, cell: Cell) -> str:
        """A hash of all that the cell's results depend on."""
        start = () if cell.task == "sft" else (self.key(self._start),)
        return grid.key(cell, self.size, self._digest, *start)

    def folder(self, cell: Cell) -> CellFolder:
        """Where a cell lives. Cells of other settings have other folders."""
        return CellFolder(self.out / "cells" / f"{cell.label}-{self.key(cell)}")

    @property
    def base_folder(self) -> CellFolder:
        """Where the scores of the untrained model are."""
        key = grid.short_hash(self._digest, repr(self.scoring))
        return CellFolder(self.out / "cells" / f"base-{key}")

    @property
    def _start(self) -> Cell:
        """The SFT cell whose model DPO starts from; it is kept."""
        return self._best["sft"][FULL]

    @property
    def _reference(self) -> Path:
        return self.folder(self._start).path / "reference.json"

    def recipe(self, cell: Cell) -> grid.Yaml:
        """The whole YAML of a cell."""
        if cell.task == "sft":
            base, train, kind = self.base, self.data.sft("train"), "chat_template"
            fields = {"field_messages": "messages"}
        else:
            base, train = self.folder(self._start).model, self.data.dpo("train")
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
            tuning = len(task.methods) * len(task.learning_rates)
            others = len(task.methods) * (len(self.size.seeds) - 1)
            self.plan((tuning + others) * _TRAIN + (len(task.methods) + others) * _TEST)
        self._run_task(self.size.sft, runner, self._base_jobs())
        if FULL in self._best["sft"]:
            for job in self._start_jobs():  # The second needs the first.
                runner.run([job])
            self._run_task(self.size.dpo, runner, [])

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
        }
        return [Job("base model", test_sft, arguments, folder.tested, folder.log, _TEST)]

    def _start_jobs(self) -> list[Job]:
        """What DPO needs before its first cell: a model, and what it thinks of the pairs."""
        folder = self.folder(self._start)
        jobs = []
        if not quickstart.is_trained(folder.model):  # Somebody removed it.
            jobs.append(self._job(self._start, train=True, test=True))
        if not self._reference.is_file():
            arguments = {"model": folder.model, "data": self.data, "file": self._reference}
            label = "reference of DPO"
            jobs.append(Job(label, score_reference, arguments, self._reference, folder.log, _TEST))
        self.plan(sum(job.weight for job in jobs))
        return jobs

    def _run_task(self, task: Task, runner: Runner, first: list[Job]) -> None:
        """Tune each method, then train the chosen cells with the other seeds, and judge them."""
        tuning = grid.tuning_cells(task, self.size.seeds[0])
        runner.run([*first, *self._jobs(dict.fromkeys(tuning, _TRAIN), test=False)])
        losses = self._validation_losses(tuning)
        # A method of which a cell failed was not tuned like the others.
        broken = {cell.method for cell in tuning if cell not in losses}
        whole = {cell: loss for cell, loss in losses.items() if cell.method not in broken}
        self._best[task.name] = grid.choose(whole)
        final = self.final_cells(task)
        planned = {cell: _TEST if cell in tuning else _TRAIN + _TEST for cell in final}
        runner.run(self._jobs(planned, test=True))

    def final_cells(self, task: Task) -> list[Cell]:
        """The cells that the tables are made of; none before the learning rates are chosen."""
        return grid.seed_cells(self._best[task.name].values(), self.size.seeds)

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
        }
        result = folder.tested if test else folder.trained
        weight = train * _TRAIN + test * _TEST
        return Job(cell.label, run_cell, arguments, result, folder.log, weight)

    def tidy(self) -> None:
        """Remove models that nothing needs any more: they would fill the disk.

        While a method is tuned only its best model so far is kept, later those not judged yet, and
        in the end the one that DPO starts from.
        """
        for task in (self.size.sft, self.size.dpo):
            if task.name == "dpo" and not self._best["sft"]:
                return
            losses = self._validation_losses(grid.tuning_cells(task, self.size.seeds[0]))
            kept = set(grid.choose(losses).values())
            tested = {c for c in self.final_cells(task) if self.folder(c).tested.is_file()}
            for cell in (losses.keys() - kept) | tested:
                if self._best["sft"] and cell == self._start:
                    continue
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
            if task.name == "dpo" and FULL not in self._best["sft"]:
                continue
            final = self.final_cells(task)
            tuning = grid.tuning_cells(task, self.size.seeds[0])
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


def token_counter(model: Path) -> sources.CountTokens:
    """Counts the tokens of a question and its answer as a chat of the model in this folder."""
    from transformers import AutoTokenizer

    from benchmarks.study.scoring import encode

    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(question: str, answer: str) -> int:
        row = sources.Problem(question, answer).row()
        prompt, reply = encode(tokenizer, cast(list[sources.Turn], row["messages"]))
        return len(prompt) + len(reply)

    return count
