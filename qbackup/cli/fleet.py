"""Several VMs in one command: what is told of each when it ends, and one summary of all.

For people: a line for each VM on stderr when it ends, and a table on stdout. With `--json`: the
`summary` or the `error` of each VM, and a last line of type `summaries`.
"""

import argparse
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from qbackup.actions.fleet import Ended, for_each_vm
from qbackup.cli.context import Context
from qbackup.cli.output import answer, report_error
from qbackup.errors import EXIT_DEGRADED, worst_exit_code
from qbackup.model.progress import Reporter
from qbackup.model.quantities import format_duration
from qbackup.ui.reporters import make_reporter, print_json_line
from qbackup.ui.tables import table

_RESULTS = {
    0: "done",
    EXIT_DEGRADED: "degraded",
    4: "refused",
    11: "locked",
    12: "unreachable",
    13: "damaged",
    14: "no-remote",
}
"""The result of a VM in one word; every other exit code is `failed`."""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What a command did with one VM.

    `document` is its summary, and `text` the same for people. Of several VMs, `line` is told when
    one ends, and `columns` and `facts` stand in the summary of all; `detailed`: after the texts.
    """

    document: Callable[[], dict[str, Any]]
    text: Callable[[], str]
    line: str
    columns: tuple[str, ...]
    facts: dict[str, Any]
    exit_code: int = 0
    detailed: bool = False


Work = Callable[[str, Reporter], Awaitable[Done]]


async def run_fleet(
    arguments: argparse.Namespace,
    context: Context,
    vms: Sequence[str],
    work: Work,
    *,
    head: Sequence[str],
    then: Callable[[str, Done, Reporter], Awaitable[Done]] | None = None,
) -> int:
    """Do `work` with each VM, and return the worst of their exit codes.

    `then` goes on with each that was worked on, while others are; see `for_each_vm`.
    """
    with make_reporter(json_output=context.json_output, quiet=context.quiet) as reporter:

        def on_end(one: Ended[Done]) -> None:
            reporter.ended(one.vm)
            if one.error is not None:
                report_error(
                    one.error,
                    json_output=context.json_output,
                    verbose=arguments.verbose,
                    vm=one.vm,
                )
            elif one.result is not None and context.json_output:
                print_json_line({"type": "summary", **one.result.document()})
            elif one.result is not None:
                reporter.notice(one.result.line)

        ended = await for_each_vm(
            vms,
            lambda vm: work(vm, reporter),
            parallel=arguments.parallel or context.configuration.parallel,
            on_end=on_end,
            then=None if then is None else lambda vm, done: then(vm, done, reporter),
        )
    code = worst_exit_code(map(_exit_code, ended))
    if context.json_output:
        print_json_line(_document(ended, command=arguments.name, exit_code=code))
    else:
        texts = [one.result.text() for one in ended if one.result and one.result.detailed]
        answer(None, text="\n\n".join([*texts, _table(ended, head)]), json_output=False,
               quiet=context.quiet)  # fmt: skip
    return code


def report_alone(context: Context, done: Done) -> int:
    """Tell what was done with the only VM that was named, and return its exit code."""
    if context.json_output:
        print_json_line({"type": "summary", **done.document()})
    else:
        answer(None, text=done.text(), json_output=False, quiet=context.quiet)
    return done.exit_code


def _exit_code(one: Ended[Done]) -> int:
    if one.error is not None:
        return one.error.exit_code
    return one.result.exit_code if one.result else 0


def _result(one: Ended[Done]) -> str:
    return _RESULTS.get(_exit_code(one), "failed")


def _document(ended: Sequence[Ended[Done]], *, command: str, exit_code: int) -> dict[str, Any]:
    return {
        "type": "summaries",
        "command": command,
        "exit_code": exit_code,
        "vms": [
            {
                "vm": one.vm,
                "exit_code": _exit_code(one),
                "result": _result(one),
                "message": one.error.message if one.error else None,
                "seconds": round(one.seconds, 3),
                **(one.result.facts if one.result else {}),
            }
            for one in ended
        ],
    }


def _table(ended: Sequence[Ended[Done]], head: Sequence[str]) -> str:
    """Write one line for each VM under one that counts them."""
    if not ended:
        return "no VMs"
    results = [_result(one) for one in ended]
    counts = ", ".join(f"{results.count(word)} {word}" for word in dict.fromkeys(results))
    empty = ("",) * len(head)
    rows = [
        (f"  {one.vm}", result, *(one.result.columns if one.result else empty),
         format_duration(one.seconds))
        for one, result in zip(ended, results, strict=True)
    ]  # fmt: skip
    columns = ("  VM", "RESULT", *head, "TIME")
    right = [index for index, name in enumerate(columns) if name not in ("  VM", "RESULT", "ID")]
    return (
        f"{len(ended)} VM{'s' if len(ended) > 1 else ''}: {counts}\n"
        f"{table(columns, rows, right=right)}"
    )
