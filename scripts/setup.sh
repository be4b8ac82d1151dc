# shellcheck shell=bash
#
# Sourced by the scripts beside it: installs what is missing and says what it does.
#
# Debian packages are installed as root, with sudo where the caller is not root. Everything
# else goes into .venv/ and build/ beside this folder.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$top/.venv

say() { printf '\033[2m── %s\033[0m\n' "$*" >&2; }
if [ -n "${NO_COLOR:-}" ] || [ ! -t 2 ]; then say() { printf -- '-- %s\n' "$*" >&2; }; fi
fail() { printf '%s\n' "$*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; return; fi
  command -v sudo >/dev/null || fail "this needs root or sudo: $*"
  sudo "$@"
}

# need_packages NAME...: install the Debian packages that are missing.
need_packages() {
  local package missing=()
  command -v apt-get >/dev/null || fail "this script sets up Debian; elsewhere install: $*"
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' || missing+=("$package")
  done
  # The guest's packages are downloaded as an ordinary user, which needs the lists.
  if [ ${#missing[@]} -gt 0 ] || ! apt-cache show busybox-static >/dev/null 2>&1; then
    say "reading Debian's package lists (as root)"
    as_root apt-get update -q >/dev/null || fail "apt-get update failed; is there a network?"
  fi
  if [ ${#missing[@]} -gt 0 ]; then
    say "installing Debian packages (as root): ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
      "${missing[@]}" >/dev/null || fail "apt-get install failed: ${missing[*]}"
  fi
}

# need_python SPEC: install qbackup itself into .venv; SPEC is . or .[dev].
need_python() {
  local stamp want
  want="$(python3 --version) $(cksum <"$top/pyproject.toml")"
  stamp=$venv/.qbackup-setup
  # What was installed for the tests is enough for everything else.
  grep -qxF -e ".[dev] $want" -e "$1 $want" "$stamp" 2>/dev/null && return
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "qbackup needs Python 3.11 or later; this is $(python3 --version)"
  say "installing qbackup and its Python packages into .venv"
  python3 -m venv "$venv" || fail "python3 -m venv failed"
  # compat: a path entry; the import hook that pip makes otherwise slows every start.
  (cd "$top" && "$venv/bin/pip" install -q --disable-pip-version-check -e "$1" \
    --config-settings editable_mode=compat 2>&1 |
    { grep -v '^WARNING: Location' || true; }; exit "${PIPESTATUS[0]}") ||
    fail "pip install failed; is there a network?"
  printf '%s %s\n' "$1" "$want" >"$stamp"
}
