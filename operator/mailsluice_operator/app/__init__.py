"""The operator process: composition root, command line, metrics and health."""

from mailsluice_operator.app.command import main

__all__ = ["main"]
