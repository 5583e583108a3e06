"""Finds files that have changed since they were written, and drops them and everything made from them.

Readers compare only sizes and headers, so a byte that changed under the same size may have been read before it is
found. Everything that may have read it is dropped too; everything else is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from negpipe.engine import versions
from negpipe.engine.manifest import OTHER_CONTENT, Books, File, Manifest
from negpipe.engine.stage import Context, Stage
from negpipe.engine.state import identity_of
from negpipe.errors import DamagedError, count_of
from negpipe.store.store import Store

logger = logging.getLogger(__name__)


def check_headers(store: Store, stage: Stage, manifest: Manifest) -> None:
    """Check at almost no cost, by headers, that files of the right size have the recorded kind and rows.

    Raises:
        DamagedError: a file does not.
    """
    if store.verifies:
        return
    problems = [problem for part in manifest.parts if (problem := stage.misfit(store, part))]
    if problems:
        raise DamagedError(
            f"{manifest.stage}: {problems[0]} ({len(problems)} of {len(manifest.parts)} parts)."
            " Run `negpipe mine CONFIG --repair` to recompute damaged parts and everything that may derive from them"
        )


def damaged(
    store: Store, files: Iterable[File], progress: Callable[[int], None] = lambda _: None, *, full: bool = True
) -> list[tuple[File, str]]:
    """Files that have changed since they were written, and what is wrong. Reads them in full, several at a time.

    `progress` gets the bytes of every file read. Without `full`, only sizes are checked.
    """

    def check(file: File) -> tuple[File, str | None]:
        problem = file.problem(store, full=full)
        progress(file.bytes)
        return file, problem

    with ThreadPoolExecutor() as pool:
        return [(file, problem) for file, problem in pool.map(check, files) if problem]


def drop_damaged(stage: Stage, context: Context, untrusted: set[str]) -> set[str]:
    """Drop a stage's parts that are damaged or may derive from untrusted files, including superseded parts.

    Args:
        stage: a stage whose inputs are complete.
        context: with the manifests of the stages before it.
        untrusted: store names of files that had other content than was written.

    Returns:
        untrusted files of this stage.
    """
    store, books = context.store, context.books(stage.name)
    manifest = _readable(books)
    listed = manifest.parts if manifest else ()
    # In a stage with rounds, parts may derive from one another.
    read = {file.path: file for part in (*listed, *(books.parts() if stage.rounds else ())) for file in part.files}
    if read:
        logger.info("%s: reading %s, all of its output", stage.name, count_of(len(read), "file"))
    wrong = damaged(store, read.values())
    sound = _sound(stage, context, untrusted | (_changed(wrong) if stage.rounds else set()))
    kept = {part.key for part in listed}
    if wrong or not all(map(sound, kept)):
        kept = set()
    if not kept:
        books.drop_manifest()
    for name in books.checkpoints():
        (store.scratch / name).unlink(missing_ok=True)  # intermediate search results cannot be verified
    suspects, gone = 0, []
    for key in dict.fromkeys([*(part.key for part in listed), *books.recorded()]):  # a listing may be late
        part = books.record(key)
        if part is None:
            if store.size(books.name(key)) is not None:
                logger.warning("%s: cannot read %s, dropping it", stage.name, books.name(key))
            books.forget(key)
        elif part.key not in kept:
            found = damaged(store, part.files)
            if found or not sound(part.key):
                suspects += not found
                books.forget(key)
                gone += [file.path for file in part.files]
            known = {file.digest for file, _ in wrong}
            wrong += [each for each in found if each[0].digest not in known and store.size(each[0].path) is not None]
    for name in gone:
        store.delete(name)
    for _, problem in wrong:
        logger.warning("%s: %s: recomputing it", stage.name, problem)
    if suspects:
        parts = count_of(suspects, "part")
        logger.warning("%s: %s may derive from damaged files: recomputing where needed", stage.name, parts)
    return _changed(wrong)


def drop_of_other_versions(stage: Stage, context: Context) -> None:
    """Drop the records of parts made with other library versions than are installed, so that they are recomputed.

    Their files stay until `clean` removes them.
    """
    books, now = context.books(stage.name), versions.installed(stage.libraries(context.config))
    books.drop_agreed()
    manifest = _readable(books)
    parts = {part.key: part for part in [*(manifest.parts if manifest else ()), *books.records()]}  # see above
    outdated = [part for part in parts.values() if versions.is_of_others(part, now)]
    if not outdated:
        return
    stage.examine(context)  # find what would keep it from running before dropping anything
    what = count_of(len(outdated), "part")
    logger.info("%s: recomputing %s made with other library versions", stage.name, what)
    books.drop_manifest()
    for part in outdated:
        books.forget(part.key)


def _changed(wrong: list[tuple[File, str]]) -> set[str]:
    """Files of the right size, which may have been read in their damaged state."""
    return {file.path for file, problem in wrong if problem.endswith(OTHER_CONTENT)}


def _readable(books: Books) -> Manifest | None:
    try:
        return books.manifest()
    except DamagedError as error:
        logger.warning("%s", error)
        return None


def _sound(stage: Stage, context: Context, untrusted: set[str]) -> Callable[[str], bool]:
    """A test whether the part of a key cannot derive from an untrusted file."""
    if not untrusted or not stage.inputs:
        return lambda _: True
    context = replace(stage.within(context), key=identity_of(stage, context).key)
    read_by_all = {file.path for part in stage.shared(context) for file in part.files}
    keys = {task.key for task in stage.plan(context) if untrusted.isdisjoint(_paths(task.payload))}
    return lambda key: key in keys and untrusted.isdisjoint(read_by_all)


def _paths(payload: Any) -> Iterator[str]:
    """Every string in a task's payload: the files it reads are among them."""
    if isinstance(payload, str):
        yield payload
    elif isinstance(payload, dict | list):
        for value in payload.values() if isinstance(payload, dict) else payload:
            yield from _paths(value)
