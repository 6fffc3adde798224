"""The command ``python -m benchmarks.study.sums --out DIR``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from axolotl_gmt.tools import quickstart
from benchmarks.study.cell import PRELOAD, CellFolder
from benchmarks.study.data import digest, sha256, write_jsonl, write_text
from benchmarks.study.grid import short_hash
from benchmarks.study.running import Job, Runner, forkserver
from benchmarks.study.sums import analysis, design, work
from benchmarks.study.sums.design import ARMS, FULL, Arm, Run

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
DOCS = HERE.parents[2] / "docs"
_REMARKS = Console(stderr=True, highlight=False, soft_wrap=True)


class Study:
    """One study in one folder.

    Args:
        out: Everything is written here.
        arms: Those to run.
        commit: Of the code, goes into results.
    """

    def __init__(self, out: Path, arms: Sequence[Arm] = ARMS, commit: str | None = None) -> None:
        self.out = out.resolve()
        self.arms = arms
        self.commit = commit
        self.quickstart = quickstart.Folder(self.out / "quickstart")
        self.base = self.quickstart.base_model
        self.files = work.Files(self.out / "data")
        self._hashes: dict[str, str] = {}

    def prepare(self, runner: Runner) -> None:
        """Write the model, the sums, and what the model replies before it is trained."""
        quickstart.prepare(self.quickstart, _REMARKS.print)
        sums = design.draw_sums()
        self.files.write_sums(sums.tuning, sums.test)
        for seed in (*design.TUNING_SEEDS, *design.SEEDS):
            write_jsonl(self.files.train(seed), (one.chat() for one in sums.train(seed)))
        prompts = (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines()
        if not self.files.replies.is_file():
            from benchmarks.study.sums.judging import write_replies

            arguments = {
                "model": self.base,
                "prompts": prompts,
                "new_tokens": design.REPLY_TOKENS,
                "file": self.files.replies,
            }
            log = self.out / "replies.txt"
            runner.run([Job("replies", write_replies, arguments, self.files.replies, log)])
        if not self.base_result.is_file():
            given = {"base": self.base, "files": self.files, "result": self.base_result}
            log = self.out / "base.txt"
            runner.run([Job("untrained model", work.judge_base, given, self.base_result, log)])
        self._hashes = {
            "model": sha256([self.base / "model.safetensors"]),
            "data": digest(sorted(self.files.folder.glob("*.json*"))),
        }

    @property
    def base_result(self) -> Path:
        """The scores of the untrained model."""
        return self.out / "base.json"

    def folder(self, run: Run) -> CellFolder:
        """Where a run lives. Runs of other settings, data or models have other folders."""
        written = json.dumps(design.yaml_of(run), sort_keys=True)
        key = short_hash(written, *self._hashes.values())
        return CellFolder(self.out / "runs" / f"{run.label}-{key}")

    def run(self, runner: Runner) -> None:
        """Tune every arm, then run its seeds; full fine-tuning first, which others refer to."""
        while True:
            wanted = [run for arm in self.arms for run in self._tuning(arm)]
            left = [run for run in wanted if not self.folder(run).trained.is_file()]
            if not left:
                break
            runner.run([self._job(run) for run in left])
            if runner.failed:
                return
        counted = [run for arm in self.arms for run in self.counted(arm)]
        # Seed by seed, so that an interrupted study has whole pairs.
        ordered = sorted(counted, key=lambda run: (run.arm != FULL, run.seed))
        runner.run([self._job(run) for run in ordered if not self.folder(run).trained.is_file()])

    def counted(self, arm: Arm) -> list[Run]:
        """An arm's runs at the learning rate that tuning chose; none before it is tuned."""
        if not all(self.folder(run).trained.is_file() for run in self._tuning(arm)):
            return []
        exponent = design.best(self._losses(arm))
        return [Run(arm, exponent, seed) for seed in design.SEEDS]

    def _tuning(self, arm: Arm) -> list[Run]:
        """The tuning runs that are known to be needed so far."""
        exponents = arm.grid()
        while all(len(self._losses_at(arm, e)) == len(design.TUNING_SEEDS) for e in exponents):
            more = design.beyond({e: self._losses_at(arm, e) for e in exponents})
            if more is None:
                break
            exponents.append(more)
        return [Run(arm, e, seed) for e in sorted(exponents) for seed in design.TUNING_SEEDS]

    def _losses(self, arm: Arm) -> dict[int, list[float]]:
        exponents = {run.exponent for run in self._tuning(arm)}
        return {exponent: self._losses_at(arm, exponent) for exponent in exponents}

    def _losses_at(self, arm: Arm, exponent: int) -> list[float]:
        runs = [Run(arm, exponent, seed) for seed in design.TUNING_SEEDS]
        files = [self.folder(run).trained for run in runs]
        found = [json.loads(file.read_text())["tuning"] for file in files if file.is_file()]
        return [sum(judged["losses"]) / judged["tokens"] for judged in found]

    def _job(self, run: Run) -> Job:
        folder = self.folder(run)
        recipe = {
            "base_model": str(self.base),
            **design.yaml_of(run),
            "datasets": [
                {
                    "path": str(self.files.train(run.seed)),
                    "ds_type": "json",
                    "type": "chat_template",
                    "field_messages": "messages",
                }
            ],
            "dataset_prepared_path": str(folder.prepared),
            "output_dir": str(folder.model),
        }
        write_text(folder.recipe, yaml.safe_dump(recipe, sort_keys=False))
        compared = run.is_counted and run.arm != FULL
        full = {other.seed: self.folder(other).model for other in self.counted(FULL)}
        arguments = {
            "folder": folder,
            "base": self.base,
            "files": self.files,
            "splits": ["tuning", "test"] if run.is_counted else ["tuning"],
            "full": full[run.seed] if compared else None,
            "facts": {"commit": self.commit, **self._hashes},
        }
        return Job(run.label, work.run, arguments, folder.trained, folder.log)

    def tidy(self) -> None:
        """Remove the models of runs that are judged, but those of full that others refer to."""
        kept = {self.folder(run).path for run in self.counted(FULL)}
        for folder in (self.out / "runs").glob("*"):
            if CellFolder(folder).trained.is_file() and folder not in kept:
                shutil.rmtree(CellFolder(folder).model, ignore_errors=True)

    def results(self) -> list[tuple[Run, dict[str, Any]]]:
        """Every run that is done, with what it found."""
        runs: list[Run] = [run for arm in self.arms for run in self._tuning(arm)]
        runs += [run for arm in self.arms for run in self.counted(arm)]
        files = [(run, self.folder(run).trained) for run in runs]
        return [(run, json.loads(file.read_text())) for run, file in files if file.is_file()]


def main(arguments: Iterable[str] | None = None) -> int:
    """Run what is left of the study; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.sums",
        description="The pre-registered study on sums. The same command goes on where an "
        "interrupted one stopped.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time")
    parser.add_argument("--primary", action="store_true", help="only the arms of the hypotheses")
    options = parser.parse_args(None if arguments is None else list(arguments))
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    arms = [arm for arm in ARMS if arm.is_primary or not options.primary]
    from benchmarks.measuring import commit

    study = Study(options.out, arms, commit())
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_REMARKS) as progress:
        task = progress.add_task("Runs", total=None)

        def on_end(job: Job, seconds: float, done: bool) -> None:
            progress.advance(task)
            outcome = "done" if done else f"FAILED, see {job.log}"
            progress.console.print(f"{job.label}: {outcome} ({seconds:.0f} s)")
            study.tidy()

        threads = max(1, (os.cpu_count() or 1) // options.jobs)
        runner = Runner(options.jobs, threads, forkserver(PRELOAD), on_end)
        try:
            study.prepare(runner)
            study.run(runner)
        except KeyboardInterrupt:
            progress.console.print("Interrupted. The same command goes on where this one stopped.")
            return 130
    analysis.write(study.results(), study.base_result, RESULTS, DOCS)
    return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main())
