"""`qbackup init`: the repository, the state directory, and a commented configuration."""

import argparse
import os
from pathlib import Path

from qbackup.cli.context import new_configuration_path, read_configuration
from qbackup.cli.output import answer
from qbackup.errors import RepositoryError, UsageError
from qbackup.formats.configuration import example_configuration
from qbackup.host import durable
from qbackup.repository.repository import REPOSITORY_FILE, Repository


async def run(arguments: argparse.Namespace) -> int:
    """Make whatever is missing; what is there is left as it is."""
    path = new_configuration_path(arguments.config)
    done = []
    if path.exists():
        if arguments.repository or arguments.state:
            raise UsageError(
                f"{path} exists: --repository and --state are for a new configuration",
                hint=f"change 'repository' and 'state' in {path}, or name a new file with -c",
            )
    else:
        repository, state = _default_places()
        text = example_configuration(
            repository=Path(arguments.repository).absolute()
            if arguments.repository
            else repository,
            state=Path(arguments.state).absolute() if arguments.state else state,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        await durable.replace_file(path, text.encode())
        done.append(f"wrote the configuration {path}")
    configuration = read_configuration(path)
    if (configuration.repository / REPOSITORY_FILE).exists():
        opened = Repository.open(configuration.repository)
    else:
        opened = await Repository.create(configuration.repository)
        done.append(f"made the repository {opened.path}")
    if not configuration.state.is_dir():
        try:
            configuration.state.mkdir(mode=durable.DIRECTORY_MODE, parents=True)
        except OSError as err:
            raise RepositoryError(f"{configuration.state}: {err.strerror}") from err
        done.append(f"made the state directory {configuration.state}")
    answer(
        {
            "configuration": str(path),
            "repository": str(opened.path),
            "repository_id": opened.id,
            "state": str(configuration.state),
            "done": done,
        },
        text="\n".join(done or ["everything is there already"])
        + ("" if configuration.vms else f"\nnext: add a [vm.NAME] table to {path}"),
        json_output=arguments.json,
        quiet=arguments.quiet,
    )
    return 0


def _default_places() -> tuple[Path, Path]:
    if os.geteuid() == 0:
        return Path("/srv/backups"), Path("/var/lib/qbackup")
    base = os.environ.get("XDG_DATA_HOME")
    folder = (Path(base) if base else Path("~/.local/share").expanduser()) / "qbackup"
    return folder / "backups", folder / "state"
