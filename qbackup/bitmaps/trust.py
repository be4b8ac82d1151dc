"""Is a saved bitmap still true of the disk's image? The one rule, with a QEMU and without."""

from collections.abc import Sequence
from pathlib import Path

from qbackup.bitmaps.files import NotTrustedError
from qbackup.images.stamp import take_stamp
from qbackup.model.bitmap import DeviceStamp, ImageStamp, Sameness, compare_stamps


def require_local(
    images: Sequence[Path] | None, *, trust_block_devices: bool | None
) -> Sequence[Path]:
    """Require that a disk is on files or devices of this host that may be trusted at all.

    Raises:
        NotTrustedError: it is not.
    """
    if images is None:
        raise NotTrustedError(
            "unsupported", "QEMU has no file or block device of this host open for the disk"
        )
    if trust_block_devices is False and any(image.is_block_device() for image in images):
        raise NotTrustedError(
            "unsupported", "the configuration says to trust no block device (trust_block_devices)"
        )
    return images


def require_unchanged(
    expected: ImageStamp | None, images: Sequence[Path], *, fingerprint_is_enough: bool
) -> None:
    """Require that an image was not written since `expected`.

    Raises:
        NotTrustedError: it was, or nothing proves that it was not.
    """
    try:
        now = take_stamp(images)
    except (OSError, ValueError) as err:
        raise NotTrustedError("image-changed", f"the image cannot be examined: {err}") from err
    require_same(expected, now, images, fingerprint_is_enough=fingerprint_is_enough)


def require_same(
    expected: ImageStamp | None,
    now: ImageStamp,
    images: Sequence[Path],
    *,
    fingerprint_is_enough: bool,
) -> None:
    """Require that two stamps of an image prove that nothing was written in between.

    Raises:
        NotTrustedError: something was, or they do not prove it.
    """
    sameness = compare_stamps(expected, now)
    if sameness is Sameness.CHANGED:
        raise NotTrustedError("image-changed")
    # Several files have a stamp like that of a device, made of what proves it for each file.
    files_only = not any(image.is_block_device() for image in images)
    if sameness is Sameness.ALIKE and not (fingerprint_is_enough or files_only):
        raise NotTrustedError("unproven", _why_unproven(expected, now))


def _why_unproven(expected: ImageStamp | None, now: ImageStamp) -> str:
    """Say what is missing for a proof that a block device was not written."""
    before = expected if isinstance(expected, DeviceStamp) else None
    after = now if isinstance(now, DeviceStamp) else None
    if after is not None and after.uncounted is not None:
        why = after.uncounted
    elif before is None or before.record is None or before.record.below is None:
        why = "the writes to it could not be counted when the VM ended"
    elif after is not None and after.record and after.record.session != before.record.session:
        why = "the host was started again, or the device made anew, since the VM ended"
    else:
        why = "something was written to what the block device lies on"
    return f"{why}; trust_block_devices = true would make do with a fingerprint"
