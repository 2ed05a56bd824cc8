"""The egress proxy: the one way out of a CVM, as a process of its own, and the daemon's side of it.

Decisions are pure (`target`, `client_hello`, `policy`, `addresses`, `effective`); `resolver`, `dialing`,
`exchange`, `flow` and `server` act on them in the process. `control` is what the daemon and the process say
to each other, `supervisor` the daemon's side, and `gate` what the fleet sees of it.
"""
