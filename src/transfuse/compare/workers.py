"""The processes that run carriers: each serves one at a time, and several work side by side."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import CorruptFile, Unavailable
from .table import Table

__all__ = ["Task", "Worker", "cores_here", "run_tasks"]


@dataclass(frozen=True)
class Task:
    """A carrier to run.

    Attributes:
        label: Of its record.
        plan: What the caller knows it by.
        effort: Rough seconds, for the time left.
        shares: Work it shares with others: two of one name never run side by side. None shares none.
    """

    label: str
    plan: Any
    effort: float
    shares: str | None


def run_tasks(
    tasks: Sequence[Task],
    request: Callable[[Any], Mapping[str, Any]],
    finish: Callable[[Any, dict[str, Any]], None],
    table: Table,
    *,
    log: Path,
    jobs: int,
) -> None:
    """Run tasks on `jobs` processes that divide the cores among them.

    Args:
        tasks: In the order in which they are begun.
        request: What a worker is asked, from a task's plan.
        finish: Called with a task's plan and outcome, one at a time.
        table: Told what begins and at which stage it is.
        log: Where the workers' standard error goes.
        jobs: Processes.

    Raises:
        Unavailable: a worker's process ended unexpectedly; whatever `finish` raises.
    """
    pool = _Pool(tasks, request, finish, table)
    jobs = max(1, min(jobs, len(tasks)))
    threads = [
        threading.Thread(target=pool.serve, args=(log, max(1, cores_here() // jobs)), daemon=True)
        for _ in range(jobs)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)  # so that an interruption is heard
    except BaseException:
        pool.stop()
        for thread in threads:
            thread.join(15)
        raise
    if pool.failure is not None:
        raise pool.failure


def cores_here() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Pool:
    """What the serving threads share, all under one lock."""

    def __init__(
        self,
        tasks: Sequence[Task],
        request: Callable[[Any], Mapping[str, Any]],
        finish: Callable[[Any, dict[str, Any]], None],
        table: Table,
    ):
        self.pending = list(tasks)
        self.request, self.finish, self.table = request, finish, table
        self.running: dict[str, Task] = {}
        self.workers: list[Worker] = []
        self.failure: BaseException | None = None
        self.stopped = False
        self.change = threading.Condition()

    def take(self) -> Task | None:
        """The next task that may run now; waits while there is none yet, None at the end."""
        with self.change:
            while self.pending and not self.stopped:
                busy = {task.shares for task in self.running.values()} - {None}
                task = next((t for t in self.pending if t.shares not in busy), None)
                if task is not None:
                    self.pending.remove(task)
                    self.running[task.label] = task
                    self.table.begin(
                        task.label, left=sum(t.effort for t in (*self.running.values(), *self.pending))
                    )
                    return task
                self.change.wait()
        return None

    def serve(self, log: Path, threads: int) -> None:
        """One worker's life."""
        worker: Worker | None = None
        try:
            while (task := self.take()) is not None:
                if worker is None:
                    worker = Worker(log, threads).start()
                    self.workers.append(worker)
                outcome = worker.ask(
                    self.request(task.plan), lambda name, label=task.label: self.stage(label, name)
                )
                with self.change:
                    if self.stopped:
                        return
                    self.finish(task.plan, outcome)
                    del self.running[task.label]
                    self.change.notify_all()
        except BaseException as error:
            with self.change:
                if not self.stopped:
                    self.failure = self.failure or error
            self.stop()
        finally:
            if worker is not None:
                worker.close()

    def stage(self, label: str, name: str) -> None:
        with self.change:
            if not self.stopped:
                self.table.stage(label, name)

    def stop(self) -> None:
        """End every worker; what they were at is lost, what is finished is kept."""
        with self.change:
            self.stopped = True
            self.change.notify_all()
        for worker in list(self.workers):
            worker.hang_up()


class Worker:
    """A process that runs carriers one after another, on so many threads."""

    def __init__(self, log: Path, threads: int):
        self.log, self.threads = log, threads

    def start(self) -> Worker:
        """Start the process."""
        self._stderr = open(self.log, "ab")  # noqa: SIM115  closed in `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "transfuse.compare.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(self.threads)},
        )
        return self

    def hang_up(self) -> None:
        """Close its input: it ends, and the carrier at work with it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()

    def close(self) -> None:
        """End the process."""
        self.hang_up()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def ask(self, request: Mapping[str, Any], stage: Any) -> dict[str, Any]:
        """Run one carrier; returns the message with its record, or with why there is none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        outcome: dict[str, Any] | None = None
        try:
            self._process.stdin.write(json.dumps(request, default=str) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._gone() from None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorruptFile("worker", line[:80], "is not a message", f"see {self.log}") from error
            if "stage" in message:
                stage(message["stage"])
            elif "record" in message or "failed" in message:
                outcome = message
            elif "exit" in message:
                ended = f"its process ended with {message['exit']} (killed, or out of memory); see {self.log.name}"
                return outcome or {"failed": ended, "status": "failed"}
        raise self._gone()

    def _gone(self) -> Unavailable:
        return Unavailable(
            f"the carriers' process ended unexpectedly; see {self.log}, then run again: finished carriers are kept"
        )
