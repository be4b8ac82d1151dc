"""Everything that speaks to QEMU. No raw QMP dictionary leaves this package."""
