"""`qbackup report`: a page to look at in a browser."""

import argparse
from datetime import UTC, datetime
from pathlib import Path

from qbackup.actions.report import make_report
from qbackup.cli.context import make_context
from qbackup.cli.output import answer
from qbackup.host.durable import replace_public_file
from qbackup.model.quantities import format_size
from qbackup.ui.report.page import make_page


async def run(arguments: argparse.Namespace) -> int:
    """Write the page, in place of the one before."""
    context = make_context(arguments)
    repository = context.open_repository()
    names = context.selected_names(repository, arguments)
    report = make_report(repository, names, now=datetime.now(UTC))
    page = make_page(report).encode()
    path = Path(arguments.html).absolute()
    await replace_public_file(path, page)
    answer(
        {"file": str(path), "vms": [vm.vm for vm in report.vms], "bytes": len(page)},
        text=f"wrote {path} ({format_size(len(page))})",
        json_output=context.json_output,
        quiet=context.quiet,
    )
    return 0
