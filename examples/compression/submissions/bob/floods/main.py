"""Writes without end: fills every file that it can until it is refused, then stdout, until it is ended."""

import os
import sys

BLOCK = b"\0" * (1 << 20)

for folder in (os.environ.get("HOME", "/"), "/tmp", "/dev/shm", "/var/tmp", "."):
    try:
        with open(os.path.join(folder, "flood"), "wb", buffering=0) as file:
            while file.write(BLOCK):
                pass
    except OSError as error:
        print(f"{folder}: {error.strerror}", file=sys.stderr)
while True:
    sys.stdout.buffer.write(BLOCK)
