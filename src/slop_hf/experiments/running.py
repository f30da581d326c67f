"""Trains the runs of an experiment, one after another or several at a time, and resumes after an interruption."""

from __future__ import annotations

import gc
import os
import platform
import re
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import Queue, get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from ..data import DataConfig, prepare_data
from ..errors import DivergedError, RunError, SlopError
from ..evaluation.runs import check_evaluation
from ..io.files import check_output, write_text
from ..io.numbers import require_whole_number
from ..io.serialization import parse_yaml, read_yaml, to_yaml
from ..pipeline import train_run
from ..runs.branch import inherit
from ..runs.directory import CHECKPOINT, RunDirectory
from ..runs.lock import lock_directory
from ..training.callbacks import StopAtStep
from ..training.config import preview_run
from .config import Experiment
from .jobs import (
    BRANCH_FILE,
    CONFIG_FILE,
    DIVERGED_FILE,
    LOG_FILE,
    PREFIX_FILE,
    Job,
    add_shared_prefixes,
    build_jobs,
    find_diverged,
    list_unneeded_trunks,
)
from .progress import measure_progress

_DEVICE = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")  # as CUDA_VISIBLE_DEVICES takes them

#: Called with an ended job, the number of ended jobs, and the number of all jobs.
JobEndCallback = Callable[[Job, int, int], None]


def run_experiment(
    experiment: Experiment,
    root: str | Path,
    *,
    devices: Sequence[str] = (),
    workers: int = 1,
    on_job_end: JobEndCallback | None = None,
) -> list[Job]:
    """Train all unfinished runs of an experiment; interrupted ones are resumed.

    Steps that runs share are trained once, in the folder `trunks/`. A run that diverges ends, and the others
    continue. A file `diverged.txt` in its directory says so; if you remove it, the run resumes from its last
    checkpoint.

    Args:
        experiment: experiment to run.
        root: directory of the comparison.
        devices: CUDA devices to spread the runs over, such as `("0", "1")`; one worker per device.
        workers: number of runs at a time without `devices`; each gets an equal share of the cores.
        on_job_end: function to call when a job has ended, see `JobEndCallback`.

    Returns:
        The runs and their shared prefixes, in the order of training.

    Raises:
        SlopError: if some run cannot begin (checked before any training), or if a run fails; then the runs
            in progress are still finished.
    """
    # All arms are trained with one seed before any with the next.
    jobs = sorted(list_by_need(add_shared_prefixes(build_jobs(experiment))), key=lambda job: job.seed)
    run_jobs(jobs, root, devices=devices, workers=workers, on_job_end=on_job_end)
    return jobs


def list_by_need(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs with each shared prefix or trunk right before the first run that needs it."""
    by_directory = {job.directory: job for job in jobs}
    ordered: dict[Path, Job] = {}
    for job in jobs:
        lineage, ancestor = [job], job.parent
        while job.arm and ancestor is not None:
            lineage.append(by_directory[ancestor])
            ancestor = lineage[-1].parent
        if job.arm:
            ordered |= {each.directory: each for each in reversed(lineage) if each.directory not in ordered}
    return list(ordered.values())


def run_jobs(
    jobs: Sequence[Job],
    root: str | Path,
    *,
    devices: Sequence[str] = (),
    workers: int = 1,
    on_job_end: JobEndCallback | None = None,
) -> None:
    """Train the unfinished ones of some jobs in their order; arguments and errors as for `run_experiment`.

    The jobs must use the same data, and each must come after its shared prefix or trunk.
    """
    check_output(root, error=RunError, is_directory=True)
    check_workers(devices, workers)
    root = Path(root)
    jobs = [job.continue_as_begun(root) for job in jobs]
    check_settings_unchanged(jobs, root)
    ended = find_ended(jobs, root)
    waiting = [job for job in jobs if job.directory not in ended]
    check_jobs(waiting, root)
    count = len(ended)

    def report_end(job: Job) -> None:
        nonlocal count
        count += 1
        if on_job_end is not None:
            on_job_end(job, count, len(jobs))

    with lock_directory(root, "training runs"):
        for job in jobs:
            write_text(job.sibling_file(root, CONFIG_FILE), to_yaml(job.config))
        if waiting:
            prepare_data(waiting[0].config.data)  # once, and not in every worker
        if devices or workers > 1:
            _run_in_parallel(waiting, root, list(devices) or [""] * workers, report_end)
            return
        for job in waiting:
            if job.directory not in find_diverged(jobs, root):  # its shared prefix may have diverged
                try:
                    train_job(job, root)
                except DivergedError as caught:
                    _mark_diverged(job, root, caught)
            report_end(job)


def train_job(job: Job, root: Path) -> None:
    """Train one run to its end, resuming it or beginning with its shared prefix.

    Raises:
        DivergedError: if its loss is no longer finite.
        RunError: if a signal stopped training; the whole experiment then stops.
    """
    run = RunDirectory(root / job.directory)
    if not run.exists and job.parent is not None:
        if job.first_step:
            start_from_trunk(root, job, job.parent)
        else:
            start_from_prefix(root, job, job.parent)
    callbacks = [] if job.end_step is None else [StopAtStep(job.end_step)]
    with job.sibling_file(root, LOG_FILE).open("a") as log, redirect_stdout(log), redirect_stderr(log):
        train_run(job.config, run.path, resume=True, callbacks=callbacks)
    if not job.is_finished(root):
        raise RunError(f"{job.name} was stopped by a signal, its state saved; run the same command again to resume it")


def start_from_prefix(root: Path, job: Job, prefix: Path) -> None:
    """Begin a run with the stages of its shared prefix; files are hard-linked if the disk supports it."""
    source, run = RunDirectory(root / prefix), RunDirectory(root / job.directory)
    if not (source.exists and source.is_finished):
        raise RunError(f"{source.path} has not finished; {run.path} cannot begin with it")
    write_text(job.sibling_file(root, PREFIX_FILE), f"{prefix.as_posix()}\n")  # the ledger leaves these stages out
    inherit(source, run, job.schedule, name="-".join(job.directory.parts[1:]))


def start_from_trunk(root: Path, job: Job, trunk: Path) -> None:
    """Begin a run with the last state of a trunk; the run's file `branch.json` says what the trunk has cost."""
    source, run = RunDirectory(root / trunk), RunDirectory(root / job.directory)
    stage = job.find_stage_inside(job.first_step)
    checkpoint = None if stage is None else source.running_dir(stage) / f"{CHECKPOINT}{job.first_step}"
    progress = measure_progress(job, source, job.first_step)
    progress.to_json(job.sibling_file(root, BRANCH_FILE))
    inherit(source, run, job.schedule, name="-".join(job.directory.parts[1:]), checkpoint=checkpoint)


def find_ended(jobs: Sequence[Job], root: Path) -> set[Path]:
    """Return the directories of runs that need no more training: finished and diverged ones, and unneeded trunks."""
    ended = {job.directory for job in jobs if job.is_finished(root)} | find_diverged(jobs, root)
    return ended | list_unneeded_trunks(jobs, ended)


def _mark_diverged(job: Job, root: Path, caught: BaseException) -> None:
    write_text(root / job.directory / DIVERGED_FILE, f"{caught}\n")


def describe_machine() -> str:
    """Return the hardware that this process trains on: the GPU's name, or the number of CPU cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def check_settings_unchanged(jobs: Sequence[Job], root: Path) -> None:
    """Refuse a directory in which a run was begun with other settings."""
    for job in jobs:
        path = job.sibling_file(root, CONFIG_FILE)
        has_begun = path.exists() and RunDirectory(root / job.directory).exists
        if has_begun and read_yaml(path, error=RunError) != parse_yaml(to_yaml(job.config)):
            raise RunError(
                f"{root / job.directory} was begun with other settings than the experiment now has (see {path.name} "
                "there); choose another output directory, or remove that run"
            )


def check_workers(devices: Sequence[str], workers: int) -> None:
    """Refuse devices and workers that runs cannot be spread over.

    >>> check_workers((), 0)
    Traceback (most recent call last):
    slop_hf.errors.RunError: workers must be a whole number, 1 or more, got 0
    """
    require_whole_number(workers, "workers", error=RunError)
    is_list = isinstance(devices, Sequence) and not isinstance(devices, str)
    if not is_list or not all(isinstance(device, str) and _DEVICE.fullmatch(device) for device in devices):
        raise RunError(f"devices must be a list of CUDA devices, such as ('0', '1'), got {devices!r}")
    if len(set(devices)) < len(devices):
        raise RunError(f"devices must be different, got {', '.join(devices)}: a device takes one run at a time")
    if devices and workers > 1:
        raise RunError(f"devices are given, one run at a time on each, and workers={workers}: give one of the two")
    if devices and not torch.cuda.is_available():
        raise RunError(f"devices {', '.join(devices)}: this machine has no CUDA device; give workers, for CPUs")


def check_jobs(jobs: Sequence[Job], root: Path) -> None:
    """Refuse runs that cannot begin, or that could not be compared; runs that have begun are not looked at.

    Raises:
        SlopError: naming the run.
    """
    checked: list[DataConfig] = []
    for job in jobs:
        if not RunDirectory(root / job.directory).exists:
            _check_job(job, root, check_texts=job.config.data not in checked)
            checked.append(job.config.data)


def _check_job(job: Job, root: Path, *, check_texts: bool) -> None:
    """Refuse now what training would refuse once it is the job's turn."""
    try:
        if not job.config.data.held_out or job.config.training.get("eval_before_growth") is False:
            raise RunError(
                "losses are compared on held-out documents at the end of each stage; set data.held_out, such as 0.02, "
                "and leave eval_before_growth out"
            )
        if job.config.training.get("push_to_hub"):
            raise RunError("runs of an experiment are not published; leave push_to_hub out")
        preview_run(job.config, root / job.directory, check_texts=check_texts)
        check_evaluation(job.config)
    except SlopError as caught:
        raise type(caught)(f"{job.name}: {caught}") from None


# ---- Several at a time ---------------------------------------------------------------------------------------------


def _run_in_parallel(jobs: Sequence[Job], root: Path, devices: list[str], report_end: Callable[[Job], None]) -> None:
    """Train each job as soon as a device is free and its shared prefix is finished."""
    context = _get_context()
    free = context.Queue()
    for device in devices:
        free.put(device)
    threads = max((os.cpu_count() or 1) // len(devices), 1)
    waiting, running = list(jobs), dict[Future[None], Job]()
    failure: RunError | None = None
    with ProcessPoolExecutor(len(devices), context, _claim_device, (free, threads)) as pool:
        while running or (waiting and failure is None):
            unfinished = {job.directory for job in (*waiting, *running.values())}
            ready = [job for job in waiting if failure is None and job.parent not in unfinished]
            for job in ready[: len(devices) - len(running)]:
                waiting.remove(job)
                running[pool.submit(train_job, job, root)] = job
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                job, caught = running.pop(future), future.exception()
                if caught is None:
                    report_end(job)
                elif isinstance(caught, DivergedError):
                    _mark_diverged(job, root, caught)
                    diverged = find_diverged([job, *waiting], root)
                    for other in (job, *waiting):
                        if other.directory in diverged:
                            report_end(other)
                    waiting = [other for other in waiting if other.directory not in diverged]
                else:  # the runs in progress are still finished
                    failure = failure or RunError(
                        f"{job.name} failed ({type(caught).__name__}: {caught}); see "
                        f"{job.sibling_file(root, LOG_FILE)}, and run the same command again to resume"
                    )
    if failure is not None:
        raise failure


def _get_context() -> BaseContext:
    """Return how workers start: never as forks of this process, which may have begun to use CUDA."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once for all workers
    return context


def _claim_device(free: Queue[str], threads: int) -> None:
    """In a new worker, take one of the devices, or limit torch's threads; torch looks for devices on first use."""
    gc.freeze()  # each stage collects garbage; that takes a second if the imported modules are searched too
    device = free.get()
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(threads)
