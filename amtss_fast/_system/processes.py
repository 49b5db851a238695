"""The processes of a distributed training."""

import time

from torch import distributed


def leave_process_group() -> None:
    """Waits for the other processes of the group and leaves it; every process calls this at its end.

    Without a group, as outside `torchrun`, it does nothing.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    # A process that is still at work loses its connection when another one ends.
    distributed.barrier()
    # If a thread of the group still releases a tensor while the interpreter ends, Python aborts, and the launcher stops
    # the other processes. After this wait the threads are idle.
    time.sleep(0.2)
    distributed.destroy_process_group()
