"""Runs tasks one after another in this process: for debugging, tests, and stages that stream their plan."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from negpipe.engine.stage import Context, Progressed, Stage, Task, opened


def run(stage: Stage, tasks: Iterator[Task], context: Context, progress: Progressed) -> None:
    """See `negpipe.engine.stage.TaskExecutor`."""
    first = next(tasks, None)
    if first is None:
        return
    context = context.on(context.devices()[0])
    with opened(stage, context) as running:
        for task in chain([first], tasks):

            def report(units: int, note: str, task: Task = task) -> None:
                progress(task, units, note, False)

            running.run(task, report)
            progress(task, 0, "", True)
