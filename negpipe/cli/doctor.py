"""The `doctor` command: describe this machine and this installation."""

from __future__ import annotations

from negpipe.cli.app import DebugOption, LogOption, app, checked
from negpipe.cli.formats import FormatOption, printed_as


@app.command()
def doctor(form: FormatOption = "table", log_format: LogOption = "plain", debug: DebugOption = False) -> None:
    """Describe this machine and installation on one page to paste into an issue. Contains no secrets.

    Shows versions, processor, memory, GPUs, free disk space and the hub. Exits with code 1 if something that every run
    needs is broken.

    Example: negpipe doctor
    """
    from negpipe.cli import console
    from negpipe.errors import NegpipeError
    from negpipe.review import doctor, wording

    console.set_up_logging(checked(log_format), debug=debug)
    facts = doctor.examine()
    rows = [fact._asdict() for fact in facts]
    if not printed_as(form, rows, rows):
        console.out.print(wording.visible(doctor.page(facts)), markup=False, soft_wrap=True)
    if problems := doctor.broken(facts):
        raise NegpipeError("\n".join(problems))
