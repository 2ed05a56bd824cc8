"""Never returns: reads everything, answers nothing, and ignores every request to stop."""

import signal
import sys

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.read()
while True:
    signal.pause()
