"""Running an experiment: one run after another, or several at a time on devices of their own; again after a kill."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..data import prepare_data
from ..errors import DivergedError, RunError, SlopError
from ..evaluation.runs import EvaluateStages, check_evaluation
from ..io.files import write_text
from ..io.serialization import parse_yaml, read_yaml, to_yaml
from ..runs.branch import inherit
from ..runs.directory import RunDirectory
from ..training import build_trainer, preview_run
from .arms import build_jobs
from .config import Experiment
from .jobs import CONFIG_FILE, DIVERGED_FILE, LOG_FILE, PREFIX_FILE, Job, beside, find_diverged, add_shared_prefixes

ProgressCallback = Callable[[Job, int, int], None]


def run_experiment(
    experiment: Experiment,
    root: str | Path,
    *,
    devices: Sequence[str] = (),
    workers: int = 1,
    told: ProgressCallback | None = None,
) -> list[Job]:
    """Train all runs of an experiment that have not finished; those that were interrupted go on.

    Beginnings that runs share are trained once, in `trunks/`. A run that diverges ends by that, and the others go on;
    `diverged.txt` in its directory says so, and where that is removed the run goes on from its last good state.

    Args:
        experiment: to run.
        root: its directory.
        devices: CUDA devices to spread runs over, a worker for each, such as `("0", "1")`.
        workers: without devices, how many runs at a time; each gets its share of the cores.
        told: called with a run that has ended, how many have, and how many there are.

    Returns:
        the runs with their trunks, in the order of training.

    Raises:
        SlopError: for what cannot be run, before anything is; and where a run fails, once those beside it have ended.
    """
    jobs = sorted(add_shared_prefixes(build_jobs(experiment)), key=lambda job: job.seed)  # all arms of a seed, then the next
    run_jobs(jobs, root, devices=devices, workers=workers, told=told)
    return jobs


def run_jobs(
    jobs: Sequence[Job],
    root: str | Path,
    *,
    devices: Sequence[str] = (),
    workers: int = 1,
    told: ProgressCallback | None = None,
) -> None:
    """Train those of some runs that have not ended, in their order; those that were interrupted go on.

    Args:
        jobs: runs on the same data, each after the trunk that it begins with.
        root: the directory that their places are in.
        devices, workers, told: as in `run_experiment`.

    Raises:
        SlopError: as in `run_experiment`.
    """
    root = Path(root)
    check_settings_unchanged(jobs, root)
    done = find_ended(jobs, root)
    waiting = [job for job in jobs if job.place not in done]
    for job in waiting:
        if not RunDirectory(root / job.place).exists:
            _previewed(job, root)
    with _alone_in(root):
        _train(jobs, waiting, root, devices, workers, told)


def _train(
    jobs: Sequence[Job],
    waiting: Sequence[Job],
    root: Path,
    devices: Sequence[str],
    workers: int,
    told: ProgressCallback | None,
) -> None:
    """Write the config of every job beside its place, and train those that are waiting."""
    for job in jobs:
        write_text(beside(root, job, CONFIG_FILE), to_yaml(job.config))
    if waiting:
        prepare_data(waiting[0].config.data)  # once, and not in every worker
    done = len(jobs) - len(waiting)

    def tell(job: Job) -> None:
        nonlocal done
        done += 1
        if told is not None:
            told(job, done, len(jobs))

    if devices or workers > 1:
        _run_side_by_side(waiting, root, list(devices) or [""] * workers, tell)
        return
    for job in waiting:
        if job.place not in find_diverged(jobs, root):  # with its trunk
            try:
                train_job(job, root)
            except DivergedError as caught:
                _note(job, root, caught)
        tell(job)


@contextmanager
def _alone_in(root: Path) -> Iterator[None]:
    """Two that trained the same runs would write into the same checkpoints."""
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".training.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"another process trains the runs in {root}; wait for it, or choose another directory"
        ) from None
    try:
        yield
    finally:
        lock.release()


def train_job(job: Job, root: Path) -> None:
    """Train one run to its end, from where it or its trunk has come to.

    Raises:
        DivergedError: where its loss is not finite any more.
        RunError: where training was stopped by a signal, which goes for the whole experiment.
    """
    run = RunDirectory(root / job.place)
    if not run.exists and job.parent is not None:
        start_from_prefix(root, job, job.parent)
    with beside(root, job, LOG_FILE).open("a") as log, _written_to(log):
        trainer = build_trainer(job.config, run.path)
        if (evaluating := EvaluateStages.of_run(job.config)) is not None:
            trainer.add_callback(evaluating)
        trainer.train(resume_from_checkpoint=RunDirectory(run.path).exists)
    if not is_finished(root, job):
        raise RunError(f"{job.name} was stopped by a signal, its state saved; run the same command again to go on")


def start_from_prefix(root: Path, job: Job, place: Path) -> None:
    """Begin a run with the finished stages of its trunk; files are linked where the disk can do so.

    Args:
        root: the experiment's directory.
        job: the run to begin.
        place: of the trunk.

    Raises:
        RunError: for a trunk that has not finished.
    """
    trunk, run = RunDirectory(root / place), RunDirectory(root / job.place)
    if not (trunk.exists and trunk.is_finished):
        raise RunError(f"{trunk.path} has not finished; {run.path} cannot begin with it")
    write_text(beside(root, job, PREFIX_FILE), f"{place.as_posix()}\n")  # what was not paid for, for the ledger
    inherit(trunk, run, job.schedule, name="-".join(job.place.parts[1:]))


def is_finished(root: Path, job: Job) -> bool:
    """Whether a run has been trained to its end."""
    run = RunDirectory(root / job.place)
    return run.exists and run.is_finished


def find_ended(jobs: Sequence[Job], root: Path) -> set[Path]:
    """The places of runs of which there is nothing to train any more."""
    return {job.place for job in jobs if is_finished(root, job)} | find_diverged(jobs, root)


def _note(job: Job, root: Path, caught: BaseException) -> None:
    write_text(root / job.place / DIVERGED_FILE, f"{caught}\n")


def describe_machine() -> str:
    """What this process trains on, for a record: the GPU's name, or the number of CPU cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def check_settings_unchanged(jobs: Sequence[Job], root: Path) -> None:
    """Refuse a directory where a run of the same place was begun otherwise.

    Raises:
        RunError: naming it, and what to do.
    """
    for job in jobs:
        path = beside(root, job, CONFIG_FILE)
        if not (path.exists() and RunDirectory(root / job.place).exists):
            continue
        if read_yaml(path, error=RunError) != parse_yaml(to_yaml(job.config)):
            raise RunError(
                f"{root / job.place} was begun with other settings than the experiment now has (see {path.name} "
                "there); choose another output directory, or remove that run"
            )


def _previewed(job: Job, root: Path) -> None:
    """Refuse now what a run would refuse once it is its turn."""
    try:
        preview_run(job.config, root / job.place)
        check_evaluation(job.config)
    except SlopError as caught:
        raise type(caught)(f"{job.name}: {caught}") from None


# ---- Several at a time ---------------------------------------------------------------------------------------------


def _run_side_by_side(jobs: Sequence[Job], root: Path, devices: list[str], tell: Callable[[Job], None]) -> None:
    """Run what is ready on whatever is free; a run is ready once its trunk has finished."""
    context = get_context("spawn")  # a forked process cannot use CUDA
    free = context.Queue()
    for device in devices:
        free.put(device)
    threads = max((os.cpu_count() or 1) // len(devices), 1)
    waiting, running = list(jobs), dict[Future[None], Job]()
    failed: RunError | None = None
    with ProcessPoolExecutor(len(devices), context, _claim_device, (free, threads)) as pool:
        while running or (waiting and failed is None):
            ready = [job for job in waiting if failed is None and _is_ready(job, waiting, running)]
            for job in ready[: len(devices) - len(running)]:
                waiting.remove(job)
                running[pool.submit(train_job, job, root)] = job
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                job, caught = running.pop(future), future.exception()
                if caught is None:
                    tell(job)
                elif isinstance(caught, DivergedError):
                    _note(job, root, caught)
                    lost = find_diverged([job, *waiting], root)
                    for other in [job, *(one for one in waiting if one.place in lost)]:
                        tell(other)
                    waiting = [one for one in waiting if one.place not in lost]
                else:  # those beside it come to their end
                    failed = failed or _failure(job, root, caught)
    if failed is not None:
        raise failed


def _is_ready(job: Job, waiting: Sequence[Job], running: dict[Future[None], Job]) -> bool:
    return job.parent is None or job.parent not in {other.place for other in (*waiting, *running.values())}


def _failure(job: Job, root: Path, caught: BaseException) -> RunError:
    what = f"{type(caught).__name__}: {caught}"
    return RunError(
        f"{job.name} failed ({what}); see {beside(root, job, LOG_FILE)}, and run the same command again to go on"
    )


def _claim_device(free: Any, threads: int) -> None:
    """In a new worker: take one of the devices, or a share of the cores; torch looks for devices on first use."""
    device = free.get()
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(threads)


@contextmanager
def _written_to(log: Any) -> Iterator[None]:
    """What a trainer prints goes into the run's log, not between the lines of the comparison."""
    with redirect_stdout(log), redirect_stderr(log):
        yield
        sys.stdout.flush()
