"""Runs tasks one after another in this process: for debugging, tests, and stages that stream their plan."""

from __future__ import annotations

from collections.abc import Iterator

from negpipe.engine.stage import Context, Progressed, Stage, Task, opened


def run(stage: Stage, tasks: Iterator[Task], context: Context, progress: Progressed) -> None:
    """See `negpipe.engine.stage.TaskExecutor`."""
    first = next(tasks, None)
    if first is None:
        return
    context = context.on(context.devices()[0])
    with opened(stage, context) as running:
        task: Task | None = first
        while task is not None:
            current = task

            def report(units: int, note: str, current: Task = current) -> None:
                progress(current, units, note, False)

            running.run(current, report)
            progress(current, 0, "", True)
            task = next(tasks, None)
