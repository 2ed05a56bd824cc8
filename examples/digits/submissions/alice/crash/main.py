"""Crashes: reads address 0, as a native extension with a bug would. Ends by SIGSEGV."""

import ctypes
import sys

sys.stdin.readline()
print("0", flush=True)
ctypes.string_at(0)
