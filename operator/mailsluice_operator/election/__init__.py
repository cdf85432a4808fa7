"""One of several operator processes leads: by a Lease, and with a deadline of its own before each write.

The election of the Kubernetes client is not used: when the API server cannot be reached it ends without ending what the
leader does, and then two processes write. Here a process stops writing by its own clock, before another may begin.
"""

from mailsluice_operator.election.candidate import Candidate, Record
from mailsluice_operator.election.election import Election, LeadershipLostError

__all__ = ["Candidate", "Election", "LeadershipLostError", "Record"]
