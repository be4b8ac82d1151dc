"""Bitmaps that outlive a run or a QEMU: loaded, saved, rolled back, guarded."""
