"""Counts of rate limits that the replicas of a relay share. `target` says where they are; `store` keeps them there."""
