"""Secrets: none survives, whatever the option, the syntax and the order; the rest stays."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbackup.model.secrets import REDACTED, redacted, redacted_command_line

QEMU = "qemu-system-x86_64"
MARK = "Zx7Qw9"
"""Every secret below holds it, at both ends."""

plain_text = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), max_size=12
)
any_secret = plain_text.map(lambda middle: f"{MARK}{middle}{MARK}")
url_secret = st.from_regex(r"[A-Za-z0-9._~!$&'()*+;=:%@-]{0,12}", fullmatch=True).map(
    lambda middle: f"{MARK}{middle}{MARK}"
)
word_secret = st.from_regex(r"[A-Za-z0-9+/=_!$%^&*(){}@:;.-]{0,12}", fullmatch=True).map(
    lambda middle: f"{MARK}{middle}{MARK}"
)


def doubled(value: str) -> str:
    """Return a value as it stands in QEMU's `key=value` syntax."""
    return value.replace(",", ",,")


def single_quoted(content: dict[str, str]) -> str:
    """Return an object with single quotes, which QEMU takes too."""

    def text(value: str) -> str:
        inner = json.dumps(value)[1:-1].replace('\\"', '"').replace("'", "\\'")
        return f"'{inner}'"

    return "{" + ", ".join(f"{text(k)}: {text(v)}" for k, v in content.items()) + "}"


def rbd(secret: str) -> str:
    """Return a name of librbd with a key, and what has to be escaped in it escaped."""
    escaped = "".join(f"\\{c}" if c in ":@=\\/" else c for c in secret)
    return rf"rbd:pool/image:id=admin:key={escaped}:mon_host=10.0.0.1\:6789"


# What takes any secret, as arguments of QEMU.
ANY: list[Callable[[str], list[str]]] = [
    lambda s: ["-object", f"secret,id=sec0,data={doubled(s)},format=raw"],
    lambda s: ["-object", f"data={doubled(s)},id=sec0,qom-type=secret"],
    lambda s: ["--object", f"secret,data={doubled(s)},id=sec0,format=base64"],
    lambda s: ["-object", json.dumps({"qom-type": "secret", "id": "s", "data": s})],
    lambda s: ["-object", json.dumps({"data": s, "id": "s", "qom-type": "secret"}, indent=1)],
    lambda s: ["-object", single_quoted({"qom-type": "secret", "id": "s", "data": s})],
    lambda s: ["-set", f"object.sec0.data={s}"],
    lambda s: ["-set", f"drive.d0.password={s}"],
    lambda s: ["-spice", f"port=5900,password={doubled(s)},disable-ticketing=off"],
    lambda s: ["-spice", f"x509-key-password={doubled(s)},tls-port=1"],
    lambda s: ["-iscsi", f"user=me,password={doubled(s)},header-digest=NONE"],
    lambda s: ["-drive", f"file.driver=http,file.url=http://h/d,file.cookie={doubled(s)}"],
    lambda s: ["-drive", f"if=none,id=d,file={doubled('json:' + json.dumps({'password': s}))}"],
    lambda s: ["-blockdev", json.dumps({"driver": "raw", "file": {"driver": "x", "key": s}})],
    lambda s: ["-blockdev", json.dumps({"a": ["json:" + json.dumps({"file.password": s})]})],
    lambda s: ["-hda", "json:" + json.dumps({"file": {"driver": "https", "cookie": s}})],
    lambda s: ["-device", f"vfio-pci,host=1:0.0,vf-token={doubled(s)}"],
    lambda s: ["-device", json.dumps({"driver": "vfio-pci", "vf-token": s})],
    lambda s: ["-netdev", f"l2tpv3,id=n,src=a,dst=b,rxcookie={doubled(s)},txcookie={doubled(s)}"],
    lambda s: ["-fw_cfg", f"name=opt/org.flatcar-linux/config,string={doubled(s)}"],
    lambda s: ["-smbios", f"type=11,value=io.systemd.credential:a={doubled(s)},value={doubled(s)}"],
    lambda s: ["-smbios", f"value={doubled(s)},type=0x0B"],
    lambda s: ["-global", f"driver=x,property=password,value={doubled(s)}"],
    lambda s: ["-global", f"x.password={s}"],
]
URL: list[Callable[[str], list[str]]] = [
    lambda s: ["-drive", f"file=ssh://me:{doubled(s)}@host/a,format=raw"],
    lambda s: ["-drive", f"format=raw,file=https://me:{doubled(s)}@host/a?b=c"],
    lambda s: ["-drive", f"file=https://host/a?X-Amz-Signature={doubled(s)},format=raw"],
    lambda s: ["-drive", f"file=https://host/a?sv=1&sig={doubled(s)},format=raw"],
    lambda s: ["-cdrom", f"ftp://me:{s}@host/a.iso"],
    lambda s: [f"https://me:{s}@host/a,b"],
    lambda s: ["-hda", f"HTTPS://{s}@host/a"],
    lambda s: ["-hda", f"https://{s}:x-oauth-basic@host/a"],
    lambda s: ["-drive", f"file=iscsi://me%{doubled(s)}@host/iqn/0"],
    lambda s: ["-blockdev", json.dumps({"driver": "http", "url": f"http://me:{s}@h/x"})],
    lambda s: ["-append", f"root=/dev/vda inst.ks=https://me:{s}@host/ks quiet"],
]
WORD: list[Callable[[str], list[str]]] = [
    lambda s: ["-drive", f"file={doubled(rbd(s))},format=raw"],
    lambda s: ["-hda", rbd(s)],
    lambda s: ["-append", f"console=ttyS0 rd.luks.key={s} quiet"],
    lambda s: ["-append", f'"password={s} x{s}" quiet'],
    lambda s: ["-append", f'api_token="{s} x{s}" client_secret={s}'],
    lambda s: ["-append", f"systemd.set_credential=login.root:{s} quiet"],
    lambda s: ["-incoming", f"exec:fetch --password {s} host"],
]
HARMLESS = [
    *("-S", "-nodefaults", "-m", "256", "-name", "guest=vm1,debug-threads=on"),
    *("-vnc", ":1,password=on", "-vnc", ":2,password-secret=sec0", "-smbios", "type=1,serial=x,,y"),
    *("-object", "secret,id=sec0,file=/etc/key", "-spice", "x509-key-file=/etc/x.pem"),
    *("-drive", "file=/a,,b,encrypt.key-secret=sec0", "-hda", "ssh://root@host/disk?check=no"),
    *("-blockdev", '{"driver":"raw", "node-name":"key","file":{"driver":"file","filename":"/a"}}'),
    *("-fw_cfg", "name=opt/a,file=/b", "-device", "virtio-iommu,boot-bypass=on"),
    *("-append", "root=/dev/vda vconsole.keymap=us quiet", "-drive", "file=nbd://h/x,id=b"),
    *("-set", "drive.x.file=/a,b", "-object", "secret_keyring,id=s,serial=1", "-k", "de"),
]


@given(
    groups=st.lists(
        st.one_of(
            st.builds(lambda build, s: build(s), st.sampled_from(ANY), any_secret),
            st.builds(lambda build, s: build(s), st.sampled_from(URL), url_secret),
            st.builds(lambda build, s: build(s), st.sampled_from(WORD), word_secret),
            st.just(HARMLESS),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_no_secret_survives_and_redacting_again_changes_nothing(groups: list[list[str]]) -> None:
    clean = redacted_command_line([QEMU, *(word for group in groups for word in group)])
    assert MARK not in "\0".join(clean)
    assert redacted_command_line(clean) == clean


@pytest.mark.parametrize("build", [*ANY, *URL, *WORD])
def test_every_kind_of_secret_is_replaced_where_it_stands(
    build: Callable[[str], list[str]],
) -> None:
    clean = redacted_command_line([QEMU, *build(f"{MARK}a")])
    assert MARK not in "\0".join(clean)
    assert REDACTED in "\0".join(clean)


def test_what_is_no_secret_stays_as_it_is() -> None:
    assert redacted_command_line([QEMU, *HARMLESS]) == [QEMU, *HARMLESS]


def test_only_the_secret_goes() -> None:
    assert redacted_command_line(
        [
            "qemu",
            "-object",
            "secret,id=s,data=a,,b,format=raw",
            "-drive",
            "file=ssh://me:p@h/x,id=d",
        ]
    ) == [
        *("qemu", "-object", "secret,id=s,data=REDACTED,format=raw"),
        *("-drive", "file=ssh://me:REDACTED@h/x,id=d"),
    ]
    assert redacted(rbd("AQ==")).startswith("rbd:pool/image:id=admin:key=REDACTED:mon_host=10")


@given(secret=any_secret)
def test_a_file_name_in_json_keeps_no_secret(secret: str) -> None:
    name = "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "https", "cookie": secret}})
    for text in (name, f"Could not open '{name}': No such file or directory"):
        clean = redacted(text)
        assert MARK not in clean
        assert '"driver": "qcow2"' in clean
        assert redacted(clean) == clean


@given(secret=url_secret)
@pytest.mark.parametrize(
    "message",
    [
        "Could not open 'https://me:{}@host/a': Permission denied",
        'Could not open \'json:{{"driver":"x","password":"{}',  # cut off by QEMU
        "Invalid parameter in -spice port=1,password={},x=y",
        "secret,id=s,data={}: bad",
        "a=b:key={}",
    ],
)
def test_a_message_keeps_no_secret(message: str, secret: str) -> None:
    clean = redacted(message.format(secret))
    assert MARK not in clean
    assert redacted(clean) == clean


@given(st.text())
def test_no_text_is_too_strange(text: str) -> None:
    clean = redacted(text)
    assert redacted(clean) == clean
    redacted_command_line([text, "-object", text, "-append", text, "{" + text])


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "=",
        "a=",
        '{"',
        "{",
        "'",
        '"',
        "-a",
        "://",
        "rbd:",
        "\\",
        "a.",
        "{'a",
        '{"a":1}',
        " -a ",
    ],
)
def test_a_long_line_takes_no_time(unit: str) -> None:
    # pytest-timeout ends what takes quadratic time here.
    long = (unit * 131_072)[:131_072]  # Linux, MAX_ARG_STRLEN
    redacted_command_line(["qemu", "-drive", long, "-append", long])


def test_deep_json_is_redacted_as_a_whole() -> None:
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    assert redacted_command_line(["qemu", "-blockdev", deep]) == ["qemu", "-blockdev", REDACTED]
