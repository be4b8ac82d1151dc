"""Image files: hashing them, converting them with qemu-img. Knows no repository and no QMP."""
