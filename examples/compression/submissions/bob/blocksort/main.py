"""bzip2: one block-sorted block of up to 900 kB, which holds the whole text."""

import bz2
import sys

data = sys.stdin.buffer.read()
work = bz2.compress if sys.argv[1] == "compress" else bz2.decompress
sys.stdout.buffer.write(work(data))
