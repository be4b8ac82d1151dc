"""What the user writes wrong in the configuration file."""

from transcript import Transcript

VM1 = 'repository = "backups"\nstate = "state"\n[vm.vm1]\nqmp = "qmp.sock"\n'
WRONG = (
    'disk = ["data"]',
    'disks = "data"',
    "disks = []",
    'disks = ["data", "data"]',
    'granularity = "100K"',
    'granularity = "big"',
    'agent = ["qga.sock"]',
    'engine = "rsync"',
    '[vm."../vm2"]',
    "[vm.vm2]",
    '[vm.vm2]\nqmp = "tcp:4444"',
)


async def scenario(t: Transcript) -> None:
    for lines in WRONG:
        t.configure(VM1 + lines, replace=True)
        t.comment(f"the configuration ends with: {lines.replace(chr(10), ' ')}")
        await t.qbackup("list")
    t.configure('repository = "backups"', replace=True)
    t.comment("the configuration has nothing but a repository")
    await t.qbackup("list")
