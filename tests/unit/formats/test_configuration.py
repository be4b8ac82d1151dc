"""The configuration file: every mistake names the file, the key and what is allowed."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbackup.errors import ConfigurationError, UsageError
from qbackup.formats.configuration import (
    Configuration,
    ConfiguredImage,
    HookCommands,
    Remote,
    SnapshotSettings,
    Vm,
    example_configuration,
    parse_configuration,
)
from qbackup.formats.remote_url import Place
from qbackup.model.retention import Rules

PATH = Path("/etc/qbackup/config.toml")
TOP = 'repository = "/srv/backups"\nstate = "/var/lib/qbackup"\n'
TABLE = TOP + '[vm.vm1]\nqmp = "/run/vm1/qmp.sock"\n'


def parse(text: str, path: Path = PATH) -> Configuration:
    """Read a configuration that stands at `path`."""
    return parse_configuration(text, path=path)


def with_key(line: str) -> str:
    """Return a good configuration with one more line for vm1."""
    return TABLE + line + "\n"


def test_the_smallest_configuration_has_the_defaults() -> None:
    found = parse(TABLE)
    assert (found.path, found.repository) == (PATH, Path("/srv/backups"))
    assert found.state == Path("/var/lib/qbackup")
    assert found.vms == {
        "vm1": Vm(
            name="vm1",
            qmp=Path("/run/vm1/qmp.sock"),
            agent=None,
            disks=None,
            granularity_bytes=65536,
            engine="snapshot",
            snapshot=SnapshotSettings(),
        )
    }


def test_every_key_is_read() -> None:
    vm = parse(
        with_key(
            'agent = "/run/vm1/qga.sock"\ndisks = ["system", "data"]\ngranularity = "4K"\n'
            'engine = "drive-backup"'
        )
    ).vm("vm1")
    assert vm.agent == Path("/run/vm1/qga.sock")
    assert vm.disks == ("system", "data")
    assert (vm.granularity_bytes, vm.engine) == (4096, "drive-backup")


KEEP = 'last = 1\nhourly = 2\ndaily = 3\nweekly = 4\nmonthly = 5\nyearly = 6\nwithin = "30d"\n'


@pytest.mark.parametrize("table", ["keep", "vm.vm1.keep"])
def test_every_rule_of_retention_is_read(table: str) -> None:
    assert parse(f"{TABLE}[{table}]\n{KEEP}").rules("vm1") == Rules(
        last=1, hourly=2, daily=3, weekly=4, monthly=5, yearly=6, within_s=30 * 86400
    )


def test_a_vms_rules_replace_the_global_ones_whole() -> None:
    found = parse(f"{TABLE}[keep]\n{KEEP}[vm.vm1.keep]\ndaily = 9\n[vm.vm2]\nqmp = 'x'\n")
    assert found.rules("vm1") == Rules(daily=9)
    assert found.rules("vm2") == found.rules("a VM that is not in the file") == found.keep
    assert not parse(f"{TABLE}[keep]\n{KEEP}[vm.vm1.keep]\n").rules("vm1").are_given
    assert not parse(TABLE).rules("vm1").are_given


@pytest.mark.parametrize("table", ["keep", "vm.vm1.keep"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("last = 0", "{table}.last: 0 is not allowed"),
        ("daily = -1", "{table}.daily: -1 is not allowed"),
        ("daily = true", "{table}.daily: True is not allowed"),
        ("daily = 1.0", "{table}.daily: 1.0 is not allowed"),
        ("daily = '7'", "{table}.daily: '7' is not allowed"),
        ("weekly = 1000000000", "{table}.weekly: 1000000000 is not allowed"),
        ("within = 30", "{table}.within: 30 is not allowed"),
        ("within = '30 moons'", "{table}.within: '30 moons' is not a duration"),
        ("within = '0d'", "{table}.within: '0d' would keep nothing"),
        ("within = ''", "{table}.within: '' is not allowed"),
        ("keep-daily = 7", "unknown key {table}.keep-daily"),
        ("days = 7", "unknown key {table}.days"),
    ],
)
def test_a_rule_that_makes_no_sense_is_told_with_its_table(
    table: str, line: str, said: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(f"{TABLE}[{table}]\n{line}\n")
    assert caught.value.message.startswith(f"{PATH}: {said.format(table=table)}")
    assert caught.value.hint


@pytest.mark.parametrize("text", [f"keep = 7\n{TABLE}", with_key("keep = 7")])
def test_rules_are_a_table(text: str) -> None:
    with pytest.raises(ConfigurationError, match="keep: 7 is not allowed") as caught:
        parse(text)
    assert "[keep]" in str(caught.value.hint)


@pytest.mark.parametrize("word", ["direct", "blockdev-backup"])
def test_the_direct_engine_has_an_older_name(word: str) -> None:
    assert parse(with_key(f'engine = "{word}"')).vm("vm1").engine == "direct"


def test_throw_away_vms_are_emulated_unless_it_says_kvm() -> None:
    assert parse(TABLE).boot_accel == "tcg"
    assert parse(f'boot_accel = "kvm"\n{TABLE}').boot_accel == "kvm"


def test_the_snapshot_is_configured_for_all_vms() -> None:
    vm = parse(f'scratch = "tmp"\nscratch_limit = "20G"\nstall_timeout = "2m"\n{TABLE}').vm("vm1")
    assert vm.snapshot == SnapshotSettings(
        scratch=PATH.parent / "tmp", scratch_limit_bytes=20 * 1024**3, stall_timeout_s=120
    )


def test_relative_paths_are_relative_to_the_file() -> None:
    text = 'repository = "repo"\nstate = "../state"\n[vm.a]\nqmp = "q.sock"\nagent = "a.sock"\n'
    found = parse(text, Path("/home/u/qbackup.toml"))
    assert found.repository == Path("/home/u/repo")
    assert found.state == Path("/home/u/../state")
    assert (found.vm("a").qmp, found.vm("a").agent) == (
        Path("/home/u/q.sock"),
        Path("/home/u/a.sock"),
    )


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/q.sock", Path("/run/q.sock")),
        ("unix:/run/q.sock", Path("/run/q.sock")),
        ("tcp:127.0.0.1:4444", ("127.0.0.1", 4444)),
        ("tcp:vm-host:65535", ("vm-host", 65535)),
        ("tcp:[::1]:4444", ("::1", 4444)),
    ],
)
def test_a_monitor_is_a_socket_or_a_host_with_a_port(
    text: str, address: Path | tuple[str, int]
) -> None:
    assert parse(f'{TOP}[vm.vm1]\nqmp = "{text}"').vm("vm1").qmp == address


@pytest.mark.parametrize(
    ("value", "size"), [('"4K"', 4096), ('"64KiB"', 65536), ("131072", 131072), ('"2M"', 2**21)]
)
def test_a_granularity_is_a_number_or_a_size(value: str, size: int) -> None:
    assert parse(with_key(f"granularity = {value}")).vm("vm1").granularity_bytes == size


MISTAKES = {
    "no TOML": ("repository = = 1", ["not TOML", "line 1"], []),
    "empty": ("", ["repository"], []),
    "repository missing": ('state = "/s"', ["repository", "missing"], []),
    "state missing": ('repository = "/r"', ["state", "missing"], []),
    "repository a number": ('repository = 5\nstate = "/s"', ["repository"], ["a directory"]),
    "repository empty": ('repository = ""\nstate = "/s"', ["repository"], []),
    "state empty": ('repository = "/r"\nstate = ""', ["state"], []),
    "NUL in a path": ('repository = "/r\\u0000x"\nstate = "/s"', ["repository"], []),
    "unknown key at the top": (TOP + 'repo = "/x"', ["unknown key repo"], ["repository, state"]),
    "vm no table": (TOP + "vm = 5", ["vm"], []),
    "VM no table": (TOP + "[vm]\nvm1 = 5", ["vm.vm1", "table"], []),
    "VM name": (TOP + '[vm."../x"]\nqmp = "/q"', ["../x", "cannot be used"], ["letters"]),
    "VM name empty": (TOP + '[vm.""]\nqmp = "/q"', ["cannot be used"], ["letters"]),
    "qmp missing": (TOP + "[vm.vm1]", ["vm.vm1", "qmp", "missing"], []),
    "qmp empty": (TOP + '[vm.vm1]\nqmp = ""', ["vm.vm1.qmp", "tcp:HOST:PORT"], []),
    "qmp no text": (TOP + "[vm.vm1]\nqmp = 4444", ["vm.vm1.qmp"], ["monitor"]),
    "qmp a bare prefix": (TOP + '[vm.vm1]\nqmp = "unix:"', ["vm.vm1.qmp"], []),
    "agent empty": (with_key('agent = ""'), ["vm.vm1.agent"], []),
    "key of the top in a VM": (
        with_key("trust_block_devices = false"),
        ["vm.vm1.trust_block_devices"],
        ["before the first table"],
    ),
    "two VMs with one monitor": (
        with_key('[vm.vm2]\nqmp = "/run/vm1/qmp.sock"'),
        ["vm.vm1 and vm.vm2"],
        ["a qmp of its own"],
    ),
    "unknown key of a VM": (with_key('qpm = "/q"'), ["vm.vm1.qpm"], ["qmp, agent, disks"]),
    "disks no list": (with_key('disks = "system"'), ["vm.vm1.disks"], ["a list of names"]),
    "disks of numbers": (with_key("disks = [1]"), ["vm.vm1.disks"], ["a list of names"]),
    "disks empty": (with_key("disks = []"), ["vm.vm1.disks", "empty"], ["leave the key out"]),
    "disk twice": (with_key('disks = ["a", "b", "a"]'), ["vm.vm1.disks", "'a'", "twice"], []),
    "granularity no size": (with_key('granularity = "x"'), ["vm.vm1.granularity"], ["4K to 2M"]),
    "granularity too small": (with_key("granularity = 2048"), ["vm.vm1.granularity", "4K"], []),
    "granularity too large": (with_key('granularity = "4M"'), ["vm.vm1.granularity", "2M"], []),
    "granularity odd": (
        with_key("granularity = 65537"),
        ["vm.vm1.granularity", "power of two"],
        [],
    ),
    "granularity negative": (
        with_key("granularity = -65536"),
        ["vm.vm1.granularity"],
        ["power of two"],
    ),
    "granularity true": (with_key("granularity = true"), ["vm.vm1.granularity"], ["power of two"]),
    "engine unknown": (
        with_key('engine = "rsync"'),
        ["vm.vm1.engine"],
        ["snapshot", "direct", "drive-backup"],
    ),
    "boot accel": (f'boot_accel = "xen"\n{TABLE}', ["boot_accel", "xen"], ["tcg", "kvm"]),
    "scratch limit zero": (f"scratch_limit = 0\n{TABLE}", ["scratch_limit"], ["20G"]),
    "scratch limit no size": (f'scratch_limit = "much"\n{TABLE}', ["scratch_limit"], ["20G"]),
    "stall timeout short": (f"stall_timeout = 0.5\n{TABLE}", ["stall_timeout"], ["5m"]),
    "stall timeout no number": (f"stall_timeout = nan\n{TABLE}", ["stall_timeout"], ["5m"]),
    "stall timeout no time": (f'stall_timeout = "ages"\n{TABLE}', ["stall_timeout"], ["5m"]),
    "parallel none": (f"parallel = 0\n{TABLE}", ["parallel", "0"], ["from 1 to 64"]),
    "parallel many": (f"parallel = 65\n{TABLE}", ["parallel", "65"], ["from 1 to 64"]),
    "parallel of a VM": (with_key("parallel = 2"), ["vm.vm1.parallel"], ["before the first table"]),
    "socket for all": (f'{TABLE}[defaults]\nqmp = "x"', ["defaults.qmp"], ["granularity"]),
    "rules for all": (f"{TABLE}[defaults]\nkeep = {{last = 3}}", ["defaults.keep"], ["[keep]"]),
    "hooks for all": (f"{TABLE}[defaults]\n[defaults.hooks]", ["defaults.hooks"], ["[hooks]"]),
    "wrong default": (f"{TABLE}[defaults]\ngranularity = '3K'", ["defaults.granularity"], ["4K"]),
    "wrong default of none": (f"{TOP}[defaults]\ndisks = []", ["defaults.disks", "empty"], []),
    "twice for all": (
        f"max_chain = 5\n{TABLE}[defaults]\nmax_chain = 6",
        ["at the top and in [defaults]"],
        ["leave one"],
    ),
    "aged twice for all": (
        f'chain_age = "1d"\n{TABLE}[defaults]\nchain_age = "2d"',
        ["chain_age is at the top and in [defaults]"],
        ["leave one"],
    ),
    "hook no list": (f'{TABLE}[hooks]\nbefore = "sync"', ["hooks.before"], ["before = ["]),
    "hook no program": (f"{TABLE}[hooks]\nafter = []", ["hooks.after"], ["after = ["]),
    "hook with a NUL": (f'{TABLE}[hooks]\nafter = ["a", "\\u0000"]', ["hooks.after"], ["after ="]),
    "hook of another kind": (
        f'{TABLE}[hooks]\nduring = ["a"]',
        ["hooks.during"],
        ["before, after"],
    ),
    "hook timeout none": (with_key("hook_timeout = 0"), ["vm.vm1.hook_timeout"], ["5m"]),
    "hook timeout text": (with_key('hook_timeout = "x"'), ["vm.vm1.hook_timeout"], ["5m"]),
    "numbers without end": (f"repository = {'1' * 5000}", ["not TOML"], []),
    "nested without end": (f"repository = {'[' * 100_000}", ["not TOML"], []),
} | {
    f"qmp {address[:30]}": (
        f'{TOP}[vm.vm1]\nqmp = "{address}"',
        ["vm.vm1.qmp", "not an address"],
        ["tcp:127.0.0.1:4444"],
    )
    for address in (
        "tcp:",
        "tcp:host",
        "tcp:host:",
        "tcp::4444",
        "tcp:host:0",
        "tcp:host:65536",
        "tcp:host:-1",
        "tcp:host:4444x",
        "tcp:host:\u0664\u0664",
        "tcp:host:" + "9" * 5000,
    )
}


@pytest.mark.parametrize(("text", "said", "any_of"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_names_the_file_the_key_and_what_is_allowed(
    text: str, said: list[str], any_of: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    everything = f"{caught.value.message}\n{caught.value.hint}"
    assert everything.startswith(f"{PATH}: ")
    assert [word for word in said if word not in everything] == []
    assert not any_of or any(word in everything for word in any_of)


def test_defaults_count_where_a_vm_says_nothing_else() -> None:
    vms = parse(
        f"{TOP}parallel = 3\n[hooks]\nbefore = ['sync']\nafter = ['sub/x', '']\n"
        "[defaults]\nengine = 'direct'\nmax_chain = 7\nhook_timeout = '1m'\n"
        "[vm.a]\nqmp = 'a'\n[vm.b]\nqmp = 'b'\nmax_chain = 8\nhook_timeout = 5\n"
        "[vm.b.hooks]\nafter = ['/bin/b']\n"
    )
    a, b = vms.vm("a"), vms.vm("b")
    assert vms.parallel == 3
    assert (a.engine, a.max_chain, a.hook_timeout_s) == ("direct", 7, 60)
    assert (b.engine, b.max_chain, b.hook_timeout_s) == ("direct", 8, 5)
    assert a.hooks == HookCommands(before=("sync",), after=("/etc/qbackup/sub/x", ""))
    assert b.hooks == HookCommands(after=("/bin/b",))


@pytest.mark.parametrize(("asked", "said"), [("vm2", "did you mean vm1? "), ("other", "add a")])
def test_a_vm_that_is_nearly_there_is_asked_for(asked: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(TABLE).vm(asked)
    assert caught.value.hint is not None and caught.value.hint.startswith(said)


@given(st.text())
def test_any_text_is_a_configuration_or_a_configuration_error(text: str) -> None:
    try:
        parse(text)
    except ConfigurationError as err:
        assert err.message.startswith(str(PATH))


toml_values = st.sampled_from(
    ["0", "-1", "1.5", "true", '""', '"x"', '".."', "[]", "[[]]", "{}", "1979-05-27", "nan", "[1]"]
)


@given(
    st.sampled_from(["repository", "state", "vm", "vm.vm1", "vm.vm1.qmp", "vm.vm1.disks", "x.y"]),
    toml_values,
)
def test_any_value_at_any_key_is_accepted_or_a_configuration_error(key: str, value: str) -> None:
    lines = {"repository": '"/r"', "state": '"/s"', "vm.vm1.qmp": '"/q"', key: value}
    try:
        parse("\n".join(f"{name} = {text}" for name, text in lines.items()))
    except ConfigurationError as err:
        assert err.message.startswith(str(PATH))


def test_an_unknown_vm_is_told_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match=r"VM 'vm2' is not in /etc/.*\(there: vm1\)") as caught:
        parse(TABLE).vm("vm2")
    assert caught.value.hint is not None and "[vm.vm2]" in caught.value.hint


def test_a_vm_name_that_is_no_name_is_refused_before_it_is_looked_for() -> None:
    with pytest.raises(UsageError, match="cannot be used as a name"):
        parse(TABLE).vm("../vm1")


@pytest.mark.parametrize(
    ("repository", "state"),
    [
        ("/srv/backups", "/var/lib/qbackup"),
        ('/a"b', "/c\\d"),
        ("/größe", "/with space"),
        ("/line\nbreak", "/escape\x1b"),
    ],
)
def test_the_file_that_init_writes_is_read_back(repository: str, state: str) -> None:
    text = example_configuration(repository=Path(repository), state=Path(state))
    found = parse(text)
    assert (found.repository, found.state, found.vms) == (Path(repository), Path(state), {})


def test_the_example_in_the_file_that_init_writes_is_a_configuration() -> None:
    text = example_configuration(repository=Path("/r"), state=Path("/s"))
    before, _, example = text.partition("# [vm.vm1]\n")
    lines = [line.removeprefix("# ") for line in example.splitlines()]
    vm = parse("\n".join([before, "[vm.vm1]", *lines])).vm("vm1")
    assert vm.disks == ("system", "data") and vm.agent == Path("/run/vm1/qga.sock")
    assert vm.images == {
        "data": ConfiguredImage(file=Path("/var/lib/vm1/data.qcow2"), format="qcow2")
    }


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('[vm.vm1.images.data]\nfile = "a"', "vm.vm1.images.data.format is missing"),
        ('[vm.vm1.images.data]\nfile = "a"\nformat = "vmdk"', "'vmdk' is not allowed"),
        ('[vm.vm1.images.data]\nfile = "a"\nformat = "raw"\nsize = 1', "unknown key"),
        ('[vm.vm1.images]\ndata = "a"', "expected a table"),
        ('[vm.vm1.images."../x"]\nfile = "a"\nformat = "raw"', "cannot be used as a name"),
    ],
)
def test_an_image_that_makes_no_sense_is_refused(lines: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        parse(with_key(lines))


@pytest.mark.parametrize(
    ("top", "table", "found"),
    [("", "", 100), ("max_chain = 7", "", 7), ("max_chain = 7", "max_chain = 9", 9)],
)
def test_max_chain_is_for_all_vms_or_for_one(top: str, table: str, found: int) -> None:
    text = f'repository = "r"\nstate = "s"\n{top}\n[vm.a]\nqmp = "q"\n{table}\n'
    configuration = parse_configuration(text, path=Path("/etc/c.toml"))
    assert configuration.vm("a").max_chain == found


@pytest.mark.parametrize(
    ("top", "table", "found"),
    [
        ("", "", None),
        ('chain_age = "14d"', "", 14 * 86400),
        ('[defaults]\nchain_age = "14d"', "", 14 * 86400),
        ('chain_age = "14d"', 'chain_age = "36h"', 36 * 3600),
        ('[defaults]\nchain_age = "14d"', 'chain_age = "36h"', 36 * 3600),
    ],
)
def test_chain_age_is_for_all_vms_or_for_one(top: str, table: str, found: int | None) -> None:
    text = f'repository = "r"\nstate = "s"\n{top}\n[vm.a]\nqmp = "q"\n{table}\n'
    assert parse(text).vm("a").chain_age_s == found


@pytest.mark.parametrize("value", ["14", '""', '"0d"', '"-1d"', '"ages"', "true", '"14 weeks"'])
@pytest.mark.parametrize("where", ["chain_age", "vm.a.chain_age", "defaults.chain_age"])
def test_a_chain_age_that_is_no_time_is_refused_with_an_example(value: str, where: str) -> None:
    line = f"chain_age = {value}"
    top = {"chain_age": line, "defaults.chain_age": f"[defaults]\n{line}"}.get(where, "")
    table = line if where.startswith("vm") else ""
    with pytest.raises(ConfigurationError, match=f": {re.escape(where)}: ") as caught:
        parse(f'repository = "r"\nstate = "s"\n{top}\n[vm.a]\nqmp = "q"\n{table}\n')
    assert caught.value.hint is not None and 'chain_age = "14d"' in caught.value.hint


@pytest.mark.parametrize(
    ("top", "table", "found"),
    [
        ("", "", "worthwhile"),
        ('[defaults]\nconsolidate = "never"', "", "never"),
        ('[defaults]\nconsolidate = "never"', 'consolidate = "always"', "always"),
    ],
)
def test_what_is_merged_is_for_all_vms_or_for_one(top: str, table: str, found: str) -> None:
    text = f'repository = "r"\nstate = "s"\n{top}\n[vm.a]\nqmp = "q"\n{table}\n'
    configuration = parse_configuration(text, path=Path("/etc/c.toml"))
    assert configuration.vm("a").consolidate == found
    assert configuration.consolidation("a") == (found, 100)
    assert configuration.consolidation("gone") == ("never" if top else "worthwhile", 100)


@pytest.mark.parametrize(
    "value", ["0", "-1", "1001", "10000000000000000000000", "true", '"5"', "5.0"]
)
@pytest.mark.parametrize("where", ["max_chain", "vm.a.max_chain"])
def test_a_max_chain_that_makes_no_sense_is_refused_with_what_is_allowed(
    value: str, where: str
) -> None:
    top, table = (
        (f"max_chain = {value}", "") if where == "max_chain" else ("", f"max_chain = {value}")
    )
    text = f'repository = "r"\nstate = "s"\n{top}\n[vm.a]\nqmp = "q"\n{table}\n'
    with pytest.raises(ConfigurationError, match=where) as caught:
        parse_configuration(text, path=Path("/etc/c.toml"))
    assert caught.value.hint is not None and "from 1 to 1000" in caught.value.hint


def test_limits_of_age_are_for_all_vms_or_for_one() -> None:
    found = parse(
        f'warn_free = "20%"\ncritical_free = "5G"\nmetrics = "m.prom"\n{TOP}'
        '[defaults]\nwarn_age = "2h"\ncritical_age = "4h"\n'
        '[vm.vm1]\nqmp = "one.sock"\ncritical_age = "3d"\n[vm.vm2]\nqmp = "two.sock"\n'
    )
    assert (found.warn_free.percent, found.critical_free.size_bytes) == (20, 5 * 2**30)
    assert found.metrics == PATH.parent / "m.prom"
    ages = {vm.name: (vm.warn_age_s, vm.critical_age_s) for vm in found.vms.values()}
    assert ages == {"vm1": (7200, 3 * 86400), "vm2": (7200, 14400)}


@pytest.mark.parametrize(
    ("top", "table", "where"),
    [
        ("", 'warn_age = "x"', "vm.vm1.warn_age: "),
        ("", 'warn_age = "0"', "vm.vm1.warn_age: "),
        ("", 'warn_age = "3h"\ncritical_age = "2h"', "vm.vm1.warn_age: "),
        ("", 'critical_age = "-1h"', "vm.vm1.critical_age: "),
        ('warn_free = "120%"', "", "warn_free: "),
        ("", 'warn_free = "20%"', "unknown key vm.vm1.warn_free"),
        ("", '[defaults]\nwarn_age = "3h"\ncritical_age = "2h"', "defaults.warn_age: "),
    ],
)
def test_limits_that_make_no_sense_are_refused(top: str, table: str, where: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(f"{top}\n{TABLE}{table}\n")
    assert f"{PATH}: {where}" in caught.value.message


REMOTE = TOP + '[remote.offsite]\nurl = "s3://bucket/prefix"\n'


def test_a_remote_is_read() -> None:
    text = REMOTE + (
        'endpoint = "https://s3.example.org"\nregion = "eu"\nprofile = "backup"\n'
        'credentials = "keys"\nca = "/etc/ca.pem"\nparallel = 8\nlimit_rate = "20M"\n'
        'timeout = "1m"\nrecipients = ["age1x"]\nrecipients_file = "r"\nidentity = "i"\n'
        "[remote.offsite.keep]\ndaily = 30\n"
    )
    assert parse(text).remote() == Remote(
        name="offsite",
        place=Place(kind="s3", bucket="bucket", prefix="prefix"),
        endpoint="https://s3.example.org",
        region="eu",
        profile="backup",
        credentials=PATH.parent / "keys",
        ca=Path("/etc/ca.pem"),
        parallel=8,
        limit_rate_bytes=20 * 2**20,
        timeout_s=60.0,
        keep=Rules(daily=30),
        recipients=("age1x",),
        recipients_file=PATH.parent / "r",
        identity=PATH.parent / "i",
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('secret_access_key = "x"', "unknown key remote.offsite.secret_access_key"),
        ("parallel = 0", "remote.offsite.parallel: 0 is not allowed"),
        ("parallel = 65", "remote.offsite.parallel: 65 is not allowed"),
        ('limit_rate = "1"', "remote.offsite.limit_rate: '1' is too little"),
        ('limit_rate = "fast"', "remote.offsite.limit_rate: 'fast' is not a size"),
        ("limit_rate = -1", "remote.offsite.limit_rate: '-1' is not a size"),
        ("timeout = 0.5", "remote.offsite.timeout: 0.5 is less than a second"),
        ('timeout = "soon"', "remote.offsite.timeout: 'soon' is not a duration"),
        ('endpoint = "s3.example.org"', "remote.offsite.endpoint: 's3.example.org' is not an addr"),
        ('recipients = "age1x"', "remote.offsite.recipients: 'age1x' is not allowed"),
        ("[remote.offsite.keep]\ndaily = 0", "remote.offsite.keep.daily: 0 is not allowed"),
    ],
)
def test_a_remote_that_makes_no_sense_is_refused(line: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        parse(REMOTE + line)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[remote.r]\nurl = "bucket"', "remote.r.url: 'bucket' is not a place"),
        ("[remote.r]\nregion = 'x'", "the key remote.r.url is missing"),
        ('[remote.".."]\nurl = "/x"', "cannot be used as a name"),
        ('remote = "x"', "remote: 'x' is not allowed"),
        ('[remote]\nr = "x"', "remote.r: expected a table"),
        ('[remote.r]\nurl = "/x"\nregion = "eu"', "remote.r.region: this is for S3 only"),
        ('push = "r"', "push: there is no remote 'r'"),
        ('[defaults]\npush = "r"', "defaults.push: there is no remote 'r'"),
        ('[vm.v]\nqmp = "q"\npush = "r"', "vm.v.push: there is no remote 'r'"),
        ("[vm.v]\nqmp = 'q'\npush = true", "vm.v.push: True is not allowed"),
        ('push = "a"\n[defaults]\npush = "a"\n[remote.a]\nurl = "/x"', "at the top and in"),
    ],
)
def test_remotes_that_make_no_sense_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        parse(TOP + text)


@pytest.mark.parametrize(
    ("top", "table", "found"),
    [
        ("", "", None),
        ('push = "a"', "", "a"),
        ('push = "a"', 'push = "b"', "b"),
        ('push = "a"', "push = false", None),
        ('[defaults]\npush = "b"', "", "b"),
        ('[defaults]\npush = "b"', "push = false", None),
    ],
)
def test_where_backups_go_is_said_for_all_vms_or_for_one(
    top: str, table: str, found: str | None
) -> None:
    remotes = '[remote.a]\nurl = "/a"\n[remote.b]\nurl = "/b"\n'
    configuration = parse(f'{TOP}{top}\n{remotes}[vm.v]\nqmp = "q"\n{table}\n')
    assert configuration.push_target("v") == found
    assert configuration.push_target("gone") == ("a" if '"a"' in top else "b" if top else None)


def test_a_remote_is_chosen_by_name_or_is_the_only_one() -> None:
    one = parse(REMOTE)
    assert one.remote() is one.remote("offsite")
    with pytest.raises(UsageError, match="remote 'other' is not in"):
        one.remote("other")
    with pytest.raises(UsageError, match="there is no remote"):
        parse(TOP).remote()
    with pytest.raises(UsageError, match="several remotes"):
        parse(REMOTE + '[remote.nas]\nurl = "/mnt/nas"\n').remote()


def test_the_example_remote_in_the_file_that_init_writes_is_one() -> None:
    text = example_configuration(repository=Path("/r"), state=Path("/s"))
    before, _, example = text.partition("# [remote.offsite]\n")
    lines = [line.removeprefix("# ") for line in example.partition("\n\n")[0].splitlines()]
    remote = parse("\n".join([before, "[remote.offsite]", *lines])).remote()
    assert remote.keep == Rules(daily=30) and remote.is_encrypted
