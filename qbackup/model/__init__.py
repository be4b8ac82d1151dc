"""Values and pure rules: names, quantities, backups, chains. Knows no file and no QEMU."""
