"""The commands `quality` and `calibrate`: measure the encoder, and recommend settings for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from negpipe.cli.app import ConfigArgument, DebugOption, LogOption, SetOption, app, checked, named, program
from negpipe.cli.formats import FormatOption, printed_as

_STARTS = "Comma-separated, or none."
_CUTOFFS = "Comma-separated, or none; windows without a cutoff are always tried."


@app.command()
def quality(
    config: ConfigArgument,
    form: FormatOption = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Show how well the encoder finds the positives, and how far negatives are from them. Does not run any stage.

    Reports recall, MRR, nDCG and MAP on the anchors against the qrels, ranks of the positives, and scores of positives,
    negatives and random pairs.

    Example: negpipe quality quickstart.yaml
    """
    import dataclasses

    from negpipe.cli import console, formats, printed
    from negpipe.config.file import load_config
    from negpipe.review import measures

    console.set_up_logging(checked(log_format), debug=debug)
    found = measures.measure_quality(load_config(config, overrides), reporter=console.reporter(log_format))
    if not printed_as("json" if as_json else form, dataclasses.asdict(found), formats.measures(found)):
        printed.show_quality(found)


@app.command()
def calibrate(
    config: ConfigArgument,
    coverage: Annotated[
        float, typer.Option(min=0, max=1, help="Minimum share of anchors that get all their negatives.")
    ] = 0.9,
    max_leak: Annotated[
        float, typer.Option(min=0, max=1, help="Maximum upper end of the leak's 95 % interval.")
    ] = 0.05,
    range_min: Annotated[str | None, typer.Option(help=f"Window starts to try. {_STARTS}")] = None,
    relative_margin: Annotated[str | None, typer.Option(help=f"Relative margins to try. {_CUTOFFS}")] = None,
    absolute_margin: Annotated[str | None, typer.Option(help=f"Absolute margins to try. {_CUTOFFS}")] = None,
    max_score: Annotated[str | None, typer.Option(help=f"Highest scores to try. {_CUTOFFS}")] = None,
    sampling: Annotated[
        str | None, typer.Option(help="Samplers to try: top, random, simans, weighted; comma-separated.")
    ] = None,
    near_anchors: Annotated[
        float | None,
        typer.Option(
            help="Stand-in for hidden positives: positives of anchors with at least this cosine.", metavar="COSINE"
        ),
    ] = None,
    second: Annotated[
        str | None,
        typer.Option(
            help="Stand-in for hidden positives: documents that this run's model ranks above the positive.",
            metavar="CONFIG",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot leak against hardness to NAME.svg or NAME.png.")] = None,
    form: FormatOption = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Estimate the false negatives of margins and windows, and recommend a setting. Does not run any stage.

    For anchors with several positives, one is shown and the others are hidden: leak is the share of hidden positives
    among the negatives taken. Tries every window start with every sampler and each cutoff separately; other settings
    are the config's. Shows the settings that no other surpasses; --format csv prints all. Writes
    RUN_DIR/calibration.parquet.

    Example: negpipe calibrate scifact.yaml --coverage 0.95 --relative-margin 0.02,0.05,0.1 --plot leak.svg
    """
    import dataclasses

    from negpipe.cli import console, printed
    from negpipe.config.file import load_config
    from negpipe.errors import ConfigError
    from negpipe.review import measures
    from negpipe.review.calibrate import grid, recommend, to_table

    console.set_up_logging(checked(log_format), debug=debug)
    if near_anchors is not None and second is not None:
        raise ConfigError("--near-anchors and --second are alternatives: use only one")
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise ConfigError(f"--plot {plot}: expected a file name ending in .svg or .png")
    given = {
        "range_min": _numbers("--range-min", range_min, int),
        "relative_margin": _numbers("--relative-margin", relative_margin),
        "absolute_margin": _numbers("--absolute-margin", absolute_margin),
        "max_score": _numbers("--max-score", max_score),
        "sampling": _strategies(sampling),
    }
    tried: dict[str, Any] = {name: values for name, values in given.items() if values is not None}
    settings = load_config(config, overrides)
    made = measures.calibrate_settings(
        settings,
        lambda resolved: grid(resolved, **tried),
        near=near_anchors,
        second=load_config(second) if second else None,
        reporter=console.reporter(log_format),
    )
    advice = recommend(made, coverage=coverage, max_leak=max_leak)
    if plot is not None:
        measures.plot_leak(plot, made, advice)
    document = {"calibration": dataclasses.asdict(made), "recommendation": dataclasses.asdict(advice)}
    if not printed_as("json" if as_json else form, document, to_table(made).to_pylist()):
        printed.show_calibration(made, advice, coverage=coverage, max_leak=max_leak)
        where = [settings.run_dir / measures.CALIBRATION, *([plot] if plot else [])]
        console.out.print(f"\nWritten: {', '.join(map(str, where))}", markup=False)
        # If no setting provably leaks little enough, the least leak is not a reason to change a config.
        if advice.allowed and advice.chosen and (changes := advice.chosen.setting.changes(made.estimates[0].setting)):
            sets = "".join(f" --set {change}" for change in changes)
            console.out.print(f"Next: {program()} mine {named(settings)}{sets}", markup=False, soft_wrap=True)


def _numbers(option: str, text: str | None, kind: type[int] | type[float] = float) -> list[float] | None:
    from negpipe.errors import ConfigError

    if text is None:
        return None
    try:  # the grid includes windows without a cutoff, so "none" adds nothing
        return [kind(value) for value in text.split(",") if value.strip() != "none"]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected comma-separated numbers, such as 0,5,10, or none") from None


def _strategies(text: str | None) -> list[str] | None:
    from negpipe.errors import ConfigError

    names = None if text is None else text.split(",")
    for name in names or ():
        if name not in ("top", "random", "simans", "weighted"):
            raise ConfigError(f"--sampling {text}: '{name}' is not one of top, random, simans, weighted")
    return names
