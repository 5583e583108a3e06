"""Tasks one after another in this process: for debugging, for tests, and for stages that stream their plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from negpipe.engine.stage import Context, Stage, Task, run_task


def run(
    stage: Stage, tasks: Iterator[Task], context: Context, progress: Callable[[Task, int, str, bool], None]
) -> None:
    """See `negpipe.engine.stage.Executor`."""
    first = next(tasks, None)
    if first is None:
        return
    context = context.on(context.devices()[0])
    with stage.open(context) as shared:
        task: Task | None = first
        while task is not None:
            current = task

            def report(units: int, note: str, current: Task = current) -> None:
                progress(current, units, note, False)

            run_task(stage, current, shared, context, report)
            progress(current, 0, "", True)
            task = next(tasks, None)
