"""Every kind of fault that a world can hold, by the name under which each strike of it is counted."""

from __future__ import annotations

from tests.simulation.world import Book

FAULTS = {
    # Processes and clocks
    "kill": "kill -9 at any moment",
    "crashpoint": "kill -9 at a named point of a job's life or of a challenge's update",
    "stop": "SIGSTOP, and SIGCONT up to minutes later",
    "drain": "SIGTERM",
    "wall_jump": "the wall clock jumps an hour either way",
    # The network to the Platform API
    "request_lost": "a request never arrives",
    "answer_lost": "it is done, and its answer never arrives",
    "request_late": "it arrives when its caller has given up, overtaken by later ones",
    "request_repeated": "it arrives twice",
    "retry_after": "the caller is told to stay away, for up to an hour",
    "api_down": "nobody is answered",
    "cut_off": "this validator is not answered",
    "api_restart": "the Platform API restarts: connections break, leases get a term more",
    "websocket_broke": "the notification connection breaks",
    "push_lost": "a push never arrives",
    "push_repeated": "it arrives twice",
    "push_overtaken": "it arrives after a later one",
    "push_forged": "one arrives that nobody sent",
    # The disk
    "disk_full": "no write succeeds for a while",
    "disk_error": "one write fails",
    # The VMM
    "vmm_down": "nothing listens",
    "vmm_restart": "it restarts between two calls, and so does every VM",
    "vmm_silent": "one call is not answered, and not done",
    "stop_unanswered": "StopVm is done and not answered",
    "create_lost": "CreateVm is not done and not answered",
    "create_unanswered": "CreateVm is done and not answered",
    "create_late": "CreateVm times out and is done later",
    "create_twice": "CreateVm makes two VMs",
    "create_ghost": "CreateVm gives an id that Status never shows",
    "create_refused": "CreateVm is refused for no reason of ours",
    "no_cpu": "no capacity: CPU",
    "no_memory": "no capacity: memory",
    "no_cids": "no capacity: the pool of context ids",
    "no_gpu": "no capacity: GPU",
    "port_taken": "no capacity: the host port is taken",
    "remove_failed": "RemoveVm fails",
    "remove_hangs": "RemoveVm is not answered, and not done",
    "remove_unanswered": "RemoveVm is done and not answered",
    "remove_unknown": "RemoveVm says that there is no such VM",
    "removing_long": "`removing` for minutes",
    "removing_hours": "`removing` for hours",
    # VMs
    "boot_error": "the VM says that its boot failed",
    "never_answers": "the VMM says that it runs, and its SDK never answers",
    "vm_crash": "a VM exits",
    "vm_restart": "a VM exits, and is started again by the VMM",
    "vm_vanish": "somebody else deletes a VM",
    "foreign_seen": "a sweep sees a VM of somebody else's with a name like ours",
    # People
    "updated": "a challenge is updated",
    "updated_broken": "a challenge is updated to a version that cannot be had",
    "cancelled": "a job is cancelled",
}


def strike(book: Book, kind: str) -> None:
    """Count one strike.

    Raises:
        KeyError: No such kind: a fault that nobody described.
    """
    if kind not in FAULTS:
        raise KeyError(kind)
    book.counts[f"fault_{kind}"] += 1
