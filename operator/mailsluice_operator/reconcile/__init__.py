"""The level-triggered reconcile: what is there is brought to what is wanted, whatever happened in between.

`reconciler` takes a key from the work queue; `relay`, `user` and `secret` say in which order things are done for each
kind; the other files do one thing each. Nothing here is told what changed: each run reads the newest state.
"""
