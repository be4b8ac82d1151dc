"""Examples for the end of each command's `--help` and for the manual page, which indents more."""


def _examples(*lines: str) -> str:
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


EXAMPLES = {
    "qbackup": _examples(
        "qbackup init",
        "qbackup run vm1 -- qemu-system-x86_64 …    # keeps bitmaps beyond its end",
        "qbackup full vm1",
        "qbackup incremental vm1",
        "qbackup restore vm1 --to /var/tmp/vm1",
    ),
    "init": _examples(
        "qbackup init",
        "qbackup init --repository /mnt/nas/backups",
    ),
    "full": _examples(
        "qbackup full vm1",
        "qbackup full vm1 --disk system --label 'before the upgrade'",
    ),
    "incremental": _examples(
        "qbackup incremental vm1",
        "qbackup -q incremental --all --lock-wait 10m  # for cron",
        "qbackup incremental vm1 --no-fallback      # never a full backup instead",
    ),
    "list": _examples(
        "qbackup list",
        "qbackup --json list vm1",
        "qbackup list --remote offsite              # all hosts and VMs there",
    ),
    "show": _examples(
        "qbackup show vm1 20261123-1506             # or less of the id",
    ),
    "restore": _examples(
        "qbackup restore vm1 --to /var/tmp/vm1",
        "qbackup restore vm1 --to /var/tmp/vm1 --at 2026-11-23T15:07+00:00",
        "qbackup restore vm1 --to /dev/vg0/data --disk data --force",
        "qbackup restore vm1 --in-place --force     # over the images of an off VM",
        "qbackup restore vm1 --to /var/tmp/vm1 --remote offsite",
    ),
    "verify": _examples(
        "qbackup verify",
        "qbackup verify vm1 --at 20261123-1506",
        "qbackup verify vm1 --boot --expect 'login:'  # and see it start",
    ),
    "nbd": _examples(
        "qbackup nbd vm1                            # says how to look at it",
        "qbackup nbd vm1 --disk data --socket /run/vm1/data.sock",
    ),
    "mount": _examples(
        "qbackup mount vm1 /mnt/vm1                 # its files",
        "qbackup mount vm1 /mnt/vm1 --images        # each disk as a raw file",
    ),
    "boot": _examples(
        "qbackup boot vm1",
        "qbackup boot vm1 --at 20261123-1506 --memory 2G --vnc :0",
    ),
    "push": _examples(
        "qbackup push vm1",
        "qbackup -q push --all --remote offsite     # for cron",
    ),
    "pull": _examples(
        "qbackup pull vm1 --remote offsite",
        "qbackup pull --all --remote offsite --host old-host",
    ),
    "prune": _examples(
        "qbackup prune vm1 --dry-run                # what would go, and why",
        "qbackup prune vm1 --keep-daily 7 --keep-weekly 4",
    ),
    "protect": _examples(
        "qbackup protect vm1 20261123-1506          # or less of the id",
    ),
    "unprotect": _examples(
        "qbackup unprotect vm1 20261123-1506",
    ),
    "run": _examples(
        "qbackup run vm1 -- qemu-system-x86_64 -m 2G -drive if=virtio,id=data,…",
    ),
    "watch": _examples(
        "qemu-system-x86_64 … -S -qmp unix:/run/vm1/qmp.sock,server=on,wait=off &",
        "qbackup watch vm1",
    ),
    "stop": _examples(
        "qbackup stop vm1",
        "qbackup stop vm1 --timeout 5m",
    ),
    "bitmap": _examples(
        "qbackup bitmap show /var/lib/qbackup/vm1/data/*.qbm",
        "qbackup bitmap check FILE && echo clean",
    ),
    "key": _examples(
        "qbackup key new /etc/qbackup/remote.key",
        "qbackup key show /etc/qbackup/remote.key",
    ),
    "status": _examples(
        "qbackup status",
        "qbackup --json status vm1",
        "qbackup status --check --warn-age 26h      # for monitoring",
    ),
    "install-units": _examples(
        "qbackup install-units --dry-run",
        "qbackup install-units vm1",
    ),
    "report": _examples(
        "qbackup report --html /var/www/html/backups.html",
    ),
    "completion": _examples(
        'eval "$(qbackup completion bash)"          # in ~/.bashrc',
        'eval "$(qbackup completion zsh)"           # in ~/.zshrc, after compinit',
        "qbackup completion fish | source         # in ~/.config/fish/config.fish",
    ),
}
"""By the name of the command. A test requires one for each."""
