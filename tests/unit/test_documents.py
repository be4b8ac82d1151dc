"""What the documents tell people to copy: it has the right form, and qbackup takes its commands."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qbackup.cli.arguments import parse_arguments
from qbackup.formats.configuration import parse_configuration
from qbackup.formats.units import Setting, make_units

TOP = Path(__file__).parents[2]
DOCUMENTS = sorted([TOP / "README.md", *(TOP / "docs").rglob("*.md")])
SECURITY = (TOP / "docs" / "security.md").read_text()
SCHEDULING = (TOP / "docs" / "scheduling.md").read_text()

PUT, READ = {"s3:PutObject", "s3:GetObject"}, {"s3:GetObject"}
ACTIONS = {
    # Who puts reads manifests; parts of a large object are put with the same right.
    "push": PUT | {"s3:ListBucket"},
    "prune": PUT
    | {"s3:DeleteObject", "s3:AbortMultipartUpload"}
    | {"s3:ListBucket", "s3:ListBucketMultipartUploads"},
    "restore": READ | {"s3:ListBucket"},
}
OF_THE_BUCKET = {"s3:ListBucket", "s3:ListBucketMultipartUploads"}
"""Actions whose resource is the bucket; that of the others is an object."""

_ON_VM = re.compile(r"@(?:vm1|\{\{ item \}\})\.timer")


def example(name: str, text: str = SCHEDULING, mark: str = "example: ") -> str:
    """Return the block behind a mark."""
    (found,) = re.findall(rf"<!-- {mark}{name} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert isinstance(found, str)
    return found


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def require_command(words: list[str]) -> None:
    """Make sure that qbackup's own parser takes a command line."""
    assert Path(words[0]).name == "qbackup"
    assert parse_arguments(words[1:]).command


CRON_FIELDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


def require_schedule(text: str) -> None:
    """Make sure that five fields are each `*` or a number that crontab(5) allows there."""
    for field, (least, most) in zip(text.split(), CRON_FIELDS, strict=True):
        assert field == "*" or least <= int(field) <= most


@pytest.mark.parametrize("who", ACTIONS)
def test_a_policy_has_exactly_the_actions_that_are_needed(who: str) -> None:
    policy = json.loads(example(who, SECURITY, "policy: "))
    assert policy["Version"] == "2012-10-17"
    found: set[str] = set()
    for statement in policy["Statement"]:
        actions = set(listed(statement["Action"]))
        assert statement["Effect"] == "Allow" and not actions & found
        found |= actions
        of_bucket = statement["Resource"] == "arn:aws:s3:::BUCKET"
        assert of_bucket or statement["Resource"] == "arn:aws:s3:::BUCKET/PREFIX/*"
        assert actions <= OF_THE_BUCKET if of_bucket else not actions & OF_THE_BUCKET
    assert found == ACTIONS[who]
    assert not any("*" in action or "Version" in action for action in found)


def test_the_lock_lasts_for_the_chain_and_what_is_kept() -> None:
    rule = json.loads(example("", SECURITY, "lifecycle").strip())["Rules"][0]
    locked = re.search(r"--object-lock-configuration \\\n\s+'(.*?)'\n", SECURITY)
    assert locked is not None
    days = json.loads(locked[1])["Rule"]["DefaultRetention"]["Days"]
    (line,) = re.findall(r'^    (chain_age = "\w+").*$', SECURITY, re.MULTILINE)
    text = f'repository = "r"\nstate = "s"\n{line}\n[vm.a]\nqmp = "q"\n'
    age_s = parse_configuration(text, path=Path("/etc/c.toml")).vm("a").chain_age_s
    assert age_s is not None and age_s // 86400 + 30 + 1 == days
    assert rule["NoncurrentVersionExpiration"]["NoncurrentDays"] == days
    assert f'`"Days": {days}`' in SECURITY


def test_every_link_between_the_documents_leads_somewhere() -> None:
    anchors = {
        path: {
            re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        }
        for path in DOCUMENTS
    }
    lost = []
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if "://" in link:
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            if not target.exists() or (anchor and anchor not in anchors[target]):
                lost.append((path.name, link))
    assert lost == []


@pytest.mark.parametrize("document", ["README.md", "docs/scheduling.md"])
def test_cron_takes_the_lines_and_qbackup_the_commands(document: str) -> None:
    lines = [line.strip() for line in (TOP / document).read_text().splitlines()]
    jobs = [line for line in lines if re.match(r"[\d*]\S* [\d*]\S* .* root +\S", line)]
    assert len(jobs) >= 3
    for job in jobs:
        *schedule, user, command = re.split(r"\s+", job, maxsplit=6)
        require_schedule(" ".join(schedule))
        assert user == "root" and "%" not in command  # which cron makes a new line
        require_command(shlex.split(command))


def test_systemd_takes_the_drop_in_and_the_units_are_those_that_are_installed(
    tmp_path: Path,
) -> None:
    setting = Setting(
        program=["/bin/true"], configuration=tmp_path / "c", written=[tmp_path], used=[]
    )
    units = make_units(setting)
    for name, text in units.items():
        (tmp_path / name).write_text(text)
    drop_in = tmp_path / "qbackup-incremental@.timer.d"
    drop_in.mkdir()
    (drop_in / "override.conf").write_text(example("systemd"))
    found = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "qbackup-incremental@.timer")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    (drop_in / "override.conf").write_text("[Timer]\nOnCalendar=*:0/banana\n")
    found = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "qbackup-incremental@.timer")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "banana" in found.stderr  # so it was read
    assert "systemctl edit\nqbackup-incremental@.timer" in SCHEDULING
    (enable,) = re.findall(r"systemctl enable --now (.*)", SCHEDULING)
    assert {re.sub("@vm1", "@", timer) for timer in enable.split()} <= set(units)


def test_ansible_s_tasks_are_tasks_and_their_commands_qbackup_s() -> None:
    ((play,),) = [yaml.safe_load(example("ansible"))]
    words = {"register", "changed_when", "loop"}
    modules: dict[str, list[dict[str, Any]]] = {}
    for task in play["tasks"]:
        (module,) = set(task) - words
        modules.setdefault(module, []).append(task[module])
    for command in modules["ansible.builtin.command"]:
        require_command(shlex.split(command["cmd"]))
    (timer,) = modules["ansible.builtin.systemd_service"]
    assert _ON_VM.search(timer["name"]) and timer["enabled"] is True
    assert modules["ansible.builtin.template"][0]["mode"] == "0600"  # YAML 1.1: not the number


def test_the_kubernetes_job_mounts_what_it_names_and_its_command_is_qbackup_s() -> None:
    job = yaml.safe_load(example("kubernetes"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    require_schedule(job["spec"]["schedule"])
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    require_command(container["command"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"]}


def test_the_nomad_job_is_periodic_and_its_command_is_qbackup_s() -> None:
    job = json.loads(example("nomad"))["Job"]
    require_schedule(job["Periodic"]["Spec"])
    (group,) = job["TaskGroups"]
    (task,) = group["Tasks"]
    require_command([task["Config"]["command"], *task["Config"]["args"]])
