"""From the queue to upstreams and back: composes spool, delivery and dsn.

`Dispatcher` is all that others use. It decides nothing by itself: routes, outcomes, schedules and reports are pure
functions elsewhere; here they are put in order, with what is durable written before what follows from it.
"""

from mailsluice_relay.delivery.pool import UpstreamState
from mailsluice_relay.dispatch.dispatcher import Dispatcher, QueueCounts
from mailsluice_relay.dispatch.view import QueuedMessage, QueuedRecipient

__all__ = ["Dispatcher", "QueueCounts", "QueuedMessage", "QueuedRecipient", "UpstreamState"]
