"""Towards upstreams: route, connection pool, outcome classes, retry schedule."""
