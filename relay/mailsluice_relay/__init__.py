"""The relay: one asyncio process that accepts authenticated mail, makes it durable and hands it to upstreams.

It knows nothing of Kubernetes. Everything it needs stands in a configuration directory (see `config`).
"""
