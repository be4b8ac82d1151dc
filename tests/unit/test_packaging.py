"""What packages are made of: the manual page, and all that is in the wheel."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from manual import manual

from qbackup.cli.arguments import make_parser
from qbackup.cli.examples import EXAMPLES

TOP = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "MANIFEST.in", "qbackup", "packaging", "systemd")


def test_the_manual_page_has_no_fault_and_tells_what_help_tells(tmp_path: Path) -> None:
    page = tmp_path / "qbackup.1"
    page.write_text(manual())
    # mandoc's word for its mildest complaints; what is worse is in it.
    lint = subprocess.run(
        ["mandoc", "-Tlint", "-Wstyle", page], check=False, capture_output=True, text=True
    )
    assert (lint.stdout + lint.stderr, lint.returncode) == ("", 0)
    shown = subprocess.run(
        ["mandoc", "-Tutf8", "-Owidth=80", page], check=True, capture_output=True, text=True
    ).stdout
    text = re.sub(".\b", "", shown)  # bold and italic
    commands = make_parser().commands()
    assert commands is not None and commands.choices is not None
    headings = {f"   qbackup {name}\n" for name in commands.choices if name != "inc"}
    assert [heading for heading in headings if heading not in text] == []
    for example in EXAMPLES.values():
        assert [line for line in example.splitlines()[1:] if f"{line.strip()}\n" not in text] == []
    assert re.search(r"^ +11 +locked by another run$", text, re.MULTILINE)
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_the_wheel_has_all_that_belongs_to_qbackup_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "docs").mkdir(parents=True)
    shutil.copy(TOP / "docs" / "interfaces.md", tree / "docs")
    for name in SOURCES:
        copy = shutil.copytree if (TOP / name).is_dir() else shutil.copy
        copy(TOP / name, tree / name)
    stale = tree / "build" / "lib" / "qbackup" / "gone.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    program = (
        "import sys\nsys.path.insert(0, 'packaging')\n"
        "import build_backend\nprint(build_backend.build_wheel(sys.argv[1]))"
    )
    built = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=tree,
        check=True,
        capture_output=True,
        text=True,
    )
    with zipfile.ZipFile(tmp_path / built.stdout.splitlines()[-1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    prefix = "data/share/"
    shared = {name.partition(prefix)[2] for name in names if prefix in name}
    package = {name for name in names if prefix not in name}
    assert shared == {
        "man/man1/qbackup.1",
        "bash-completion/completions/qbackup",
        "zsh/site-functions/_qbackup",
        "fish/vendor_completions.d/qbackup.fish",
        *(f"doc/qbackup/systemd/{unit.name}" for unit in (TOP / "systemd").iterdir()),
    }
    modules = {str(path.relative_to(TOP)) for path in (TOP / "qbackup").rglob("*.py")}
    assert package == {*modules, "qbackup/py.typed"}
