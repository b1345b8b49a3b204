"""The one lock under which the threads of a process change what they share.

Which ids of a model are taken, its modes, torch's random state, accelerate's state: changing them
takes moments, and forward passes never wait for it. A process that is forked meanwhile waits until
nothing is half done; its own copy of the lock is free.
"""

from __future__ import annotations

import os
import threading

CHANGING = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=CHANGING.acquire,
        after_in_parent=CHANGING.release,
        after_in_child=CHANGING.release,
    )
