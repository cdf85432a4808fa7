"""SMTP as bytes and rules: grammar, parameters, line endings, header fields, the protocol engine.

Pure: no I/O, no clock, no randomness.
"""
