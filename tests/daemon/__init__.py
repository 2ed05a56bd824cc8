"""The daemon as operators meet it: processes, signals, drains."""
