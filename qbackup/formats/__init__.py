"""Bytes and documents: qcow2 headers, manifests, configuration. Pure; knows no QEMU process."""
