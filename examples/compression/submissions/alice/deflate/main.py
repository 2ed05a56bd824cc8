"""DEFLATE at its highest level: LZ77 and Huffman codes."""

import sys
import zlib

data = sys.stdin.buffer.read()
if sys.argv[1] == "compress":
    packer = zlib.compressobj(level=9, wbits=-15, memLevel=9)
    sys.stdout.buffer.write(packer.compress(data) + packer.flush())
else:
    sys.stdout.buffer.write(zlib.decompress(data, wbits=-15))
