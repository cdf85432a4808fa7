"""`mailsluice demo`: a relay on this machine, an upstream that catches its mail, applications that send through it.

Everything is real but the upstream: the resource is the YAML that a cluster would take, the relay is the process that
a pod would run. Each application stands for one that platform teams meet; the relay's own metrics count its sessions.
"""

from mailsluice_operator.demo.run import main

__all__ = ["main"]
