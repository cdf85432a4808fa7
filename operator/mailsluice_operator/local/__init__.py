"""A relay without a cluster: the same YAML, the same configuration, the same process, on this machine.

The configuration directory is written exactly as the kubelet mounts it, and `mailsluice-relay` runs as a child process,
so that what is tried here is what a pod does.
"""

from mailsluice_operator.local.compilation import Compiled, render
from mailsluice_operator.local.documents import LocalError
from mailsluice_operator.local.process import LocalRelay, Started, relay_program, run

__all__ = ["Compiled", "LocalError", "LocalRelay", "Started", "relay_program", "render", "run"]
