"""Which backups in a remote no prune removes: those that have an object `protected`."""

from qbackup.errors import BackupNotFoundError
from qbackup.remote.layout import ENCRYPTED_SUFFIX, PROTECTED_FILE, PROTECTED_TEXT
from qbackup.remote.listed import ListedVm
from qbackup.remote.prune_lock import remove


async def set_protected(vm: ListedVm, backup_id: str, *, protected: bool) -> None:
    """Let prune leave a backup alone, or not.

    A prune that is at work sees it, or has taken the backup away: so it is looked whether that is
    still there.

    Raises:
        BackupNotFoundError: a prune has removed it this moment.
        RemovalError: the key may not take the mark away.
        RemoteError: the store fails.
    """
    listed = vm.backups[backup_id]
    store = vm.remote.store
    if not protected:
        names = (PROTECTED_FILE, f"{PROTECTED_FILE}{ENCRYPTED_SUFFIX}")
        await remove(store, [vm.key(backup_id, name) for name in names if name in listed.objects])
        return
    if not listed.is_protected:
        await store.write(vm.key(backup_id, PROTECTED_FILE), PROTECTED_TEXT)
    facts = listed.manifest
    if facts is None or await store.head(facts.key) is None:
        raise BackupNotFoundError(f"{vm.vm}: backup {backup_id} is being removed this moment")
