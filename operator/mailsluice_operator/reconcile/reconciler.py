"""Takes a key from the work queue to the reconcile of its kind."""

from __future__ import annotations

from mailsluice_operator.cluster.objects import SECRET, SMTP_RELAY, SMTP_USER
from mailsluice_operator.reconcile.context import Context, Key
from mailsluice_operator.reconcile.relay import RelayReconciler
from mailsluice_operator.reconcile.secrets import reconcile_secret
from mailsluice_operator.reconcile.user import reconcile_user

KINDS = (SMTP_RELAY, SMTP_USER, SECRET)


class Reconciler:
    """What the work queue works with."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._relays = RelayReconciler(context)

    async def __call__(self, key: Key) -> float | None:
        """Bring what the key names to what is wanted; returns in how many seconds to look again, if at all."""
        if key.kind == SMTP_RELAY:
            return await self._relays.reconcile(key)
        if key.kind == SMTP_USER:
            return await reconcile_user(self._context, key)
        await reconcile_secret(self._context, key)
        return None
