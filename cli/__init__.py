"""The command line: parse, call, print. Heavy libraries are imported by a command, never at start-up."""

from __future__ import annotations

from nasdeploy.cli.app import main

__all__ = ["main"]
