"""Secrets in QEMU's words: command lines, file names and error messages without them.

A command line is kept with every backup so that the VM can be started again, and QEMU's
messages quote what they are about. Both may hold passphrases, keys and tokens; what leaves
qbackup has `REDACTED` in their place, and is otherwise as it was. References to secrets
(`password-secret=ID`, `x509-key-file=PATH`) stay: they are needed, and reveal nothing.

Where it is in doubt whether something is a secret, it is one. Redacting twice changes nothing.
Pure; it must not know where the words come from or where they go.

Sources: qemu(1); QEMU, util/keyval.c (`,,`) and qobject/json-parser.c (single quotes); QEMU,
block/rbd.c (backslashes); RFC 3986, section 3.2.1 (userinfo).
"""

import json
import re
from collections.abc import Iterable
from typing import Any

REDACTED = "REDACTED"

_SECRET_WORDS = (
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "psk",
    "key",
    "token",
    "cookie",
    "credential",
    "credentials",
    "signature",
)
_BOOLEANS = frozenset({"on", "off", "yes", "no", "true", "false"})
# Options whose words are one value, and those for which `password` is a switch.
_WHOLE = frozenset({"incoming", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "sd", "pflash"})
_SWITCHES = frozenset({"vnc", "display"})

_WEB_SCHEMES = frozenset({"http", "https", "ftp", "ftps"})
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30})://(?:([^/?#\s]*)@)?([^\s?]*)(\?\S*)?")
_RBD = re.compile(r"rbd:(?:\\.|[^\s\\])*")
_RBD_PART = re.compile(r"(?<=:)([^:=\\]*)=((?:\\.|[^:\\])*)")
_FILE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://|rbd:|json:")

_OPTION = re.compile(r"(?:[^,]|,,)+")
_KERNEL_WORD = re.compile(r'(?:[^\s"]|"[^"]*(?:"|\Z))+')
_PROGRAM_OPTION = re.compile(
    r"(?<![\w-])(--?(?:[\w-]{0,60}-)?(?:password|passwd|passphrase|pass|token|secret|key))\s+"
    r"""("[^"]*"|'[^']*'|\S+)""",
    re.IGNORECASE,
)
_WORD_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."
_MAX_KEY_CHARACTERS = 100
_VALUE = re.compile(r""""[^"]*"|'[^']*'|(?:,,|[^,\s])*""")
_ALREADY = re.compile(rf"{REDACTED}(?!\w)")

_JSON_START = re.compile(r"\{\s*[\"']")
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|[{}]', re.DOTALL)
_SINGLE_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'((?:[^\'\\]|\\.)*)\'', re.DOTALL)
_ESCAPED_OR_QUOTE = re.compile(r'\\(.)|(")', re.DOTALL)


def redacted_command_line(arguments: Iterable[str]) -> list[str]:
    """Return QEMU's arguments, the program first, without the secrets in them."""
    result = []
    option = ""
    for argument in arguments:
        result.append(_redacted_argument(option, argument))
        option = argument.lstrip("-") if argument.startswith("-") else ""
    return result


def redacted(text: str) -> str:
    """Return a file name as QEMU prints it, or a message, without the secrets in it."""
    parts = []
    done = 0
    while start := _JSON_START.search(text, done):
        parts.append(_redacted_words(text[done : start.start()]))
        end = _json_end(text, start.start())
        if end is None:
            # What is cut off in the middle cannot be judged.
            return "".join((*parts, REDACTED))
        parts.append(_redacted_json(text[start.start() : end]))
        done = end
    return "".join((*parts, _redacted_words(text[done:])))


# --- the arguments of QEMU --------------------------------------------------------


def _redacted_argument(option: str, argument: str) -> str:
    """Return what follows `option`, the one before it."""
    if argument.lstrip().startswith("{"):
        return _redacted_json(argument)
    if option == "append":
        return _KERNEL_WORD.sub(_redacted_kernel_word, argument)
    if option in ("set", "global") and "." in argument.partition("=")[0]:
        # Their value is the rest, commas and all.
        return _redacted_option(option, argument, siblings=())
    if option in _WHOLE or _FILE_NAME.match(argument):
        return redacted(argument)
    siblings = tuple(match[0] for match in _OPTION.finditer(argument))
    return _OPTION.sub(lambda match: _redacted_option(option, match[0], siblings), argument)


def _redacted_option(option: str, text: str, siblings: tuple[str, ...]) -> str:
    """Return one `key=value`, or a word alone, as it stands between single commas."""
    key, equals, value = text.partition("=")
    raw_value = option in ("set", "global") and not siblings
    if equals and _option_is_secret(option, key, siblings):
        if option in _SWITCHES and value in _BOOLEANS:
            return text
        return f"{key}={REDACTED}"
    before = value if equals else text
    plain = before if raw_value else before.replace(",,", ",")
    after = redacted(plain)
    if after == plain:
        return text
    written = after if raw_value else after.replace(",", ",,")
    return f"{key}={written}" if equals else written


def _option_is_secret(option: str, key: str, siblings: tuple[str, ...]) -> bool:
    """Tell whether the value of an option's key is a secret, whatever it is."""
    secret = _is_secret(key)
    match option, _last_part(key):
        case "object", "data":
            secret = True
        case "set", "data":
            secret = key.startswith("object.")
        case "global", "value":
            of = (s.partition("=")[2] for s in siblings if s.startswith("property="))
            secret = any(map(_is_secret, of))
        case "fw_cfg", "string":  # configurations of guests: Ignition, cloud-init, credentials
            secret = True
        case "smbios", "value":  # OEM strings hand credentials to systemd
            secret = any(re.fullmatch(r"type=0*(11|0x0*b)", s, re.IGNORECASE) for s in siblings)
    return secret


def _redacted_kernel_word(match: re.Match[str]) -> str:
    """Return one parameter of the guest's kernel; any part of its name may say `secret`."""
    word = match[0]
    key, equals, _ = word.partition("=")
    parts = re.split(r"[._-]", key.strip('"').lower())
    if equals and any(part.endswith((*_SECRET_WORDS, "secret", "pass")) for part in parts):
        return f"{key.strip(chr(34))}={REDACTED}"
    return redacted(word)


# --- names of keys ----------------------------------------------------------------


def _last_part(key: str) -> str:
    return key.rpartition(".")[2].strip().lower().replace("_", "-")


def _is_secret(key: str) -> bool:
    """Tell whether a key's value is a secret by the key's name.

    `secret` is one where it stands alone; QEMU's keys that end in it name a secret object.
    """
    name = _last_part(key)
    return name in ("secret", "pass") or name.endswith((*_SECRET_WORDS, "-pass"))


# --- words ------------------------------------------------------------------------


def _redacted_words(text: str) -> str:
    """Return text that has no JSON in it."""
    text = _RBD.sub(lambda match: _RBD_PART.sub(_redacted_rbd_part, match[0]), text)
    text = _URI.sub(_redacted_uri, text)
    text = _PROGRAM_OPTION.sub(rf"\1 {REDACTED}", text)
    with_secret_object = "secret" in text
    parts = []
    done = position = 0
    while (equals := text.find("=", position)) >= 0:
        position = equals + 1
        before = text[max(done, equals - _MAX_KEY_CHARACTERS) : equals]
        key = before[len(before.rstrip(_WORD_CHARACTERS)) :]
        secret = _is_secret(key) or (with_secret_object and _last_part(key) == "data")
        if not key or not secret or _ALREADY.match(text, position):
            continue
        value = _VALUE.match(text, position)
        end = value.end() if value else position
        if end > position:
            parts += [text[done:position], REDACTED]
            done = position = end
    return "".join((*parts, text[done:]))


def _redacted_rbd_part(match: re.Match[str]) -> str:
    return f"{match[1]}={REDACTED}" if _is_secret(match[1]) else match[0]


def _redacted_uri(match: re.Match[str]) -> str:
    """Return a URI without the password; on the web, the user and the query may be one too.

    A token stands before the colon (`TOKEN:x-oauth-basic@`) as well as after it.
    """
    scheme, user_info, rest, query = match[1], match[2], match[3], match[4]
    web = scheme.lower() in _WEB_SCHEMES
    who = ""
    if user_info is not None:
        separator = "%" if scheme.lower().startswith("iscsi") else ":"
        user, separated, _ = user_info.partition(separator)
        kept = REDACTED if web else user
        who = f"{kept}{separator}{REDACTED}@" if separated else f"{kept}@"
    if query and web and len(query) > 1:
        query = f"?{REDACTED}"
    return f"{scheme}://{who}{rest}{query or ''}"


# --- JSON -------------------------------------------------------------------------


def _json_end(text: str, start: int) -> int | None:
    """Return where the object ends that begins at `start`; None if it does not."""
    depth = 0
    for token in _JSON_TOKEN.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return None


def _redacted_json(text: str) -> str:
    """Return an object as QEMU reads it; what cannot be read is redacted as a whole."""
    try:
        content = json.loads(_SINGLE_QUOTED.sub(_double_quoted, text), strict=False)
        clean = _redacted_content(content, secret=False)
        if clean == content:
            return text
        return json.dumps(clean, ensure_ascii=False)
    except (ValueError, RecursionError):
        return REDACTED


def _double_quoted(match: re.Match[str]) -> str:
    """Return a string with double quotes; QEMU also takes single ones."""
    if match[0].startswith('"'):
        return match[0]

    def escape(part: re.Match[str]) -> str:
        if part[2]:
            return '\\"'
        return "'" if part[1] == "'" else part[0]

    return f'"{_ESCAPED_OR_QUOTE.sub(escape, match[1])}"'


def _redacted_content(value: Any, *, secret: bool) -> Any:
    """Return decoded JSON; `secret` tells that the key of it says so."""
    if value is None or isinstance(value, bool):
        return value
    if secret:
        return REDACTED
    if isinstance(value, dict):
        is_object = "qom-type" in value
        return {
            key: _redacted_content(
                item, secret=_is_secret(key) or (is_object and _last_part(key) == "data")
            )
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_redacted_content(item, secret=False) for item in value]
    return redacted(value) if isinstance(value, str) else value
