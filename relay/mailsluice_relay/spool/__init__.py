"""The durable queue: what got 250 is here until it is delivered or failed."""
