"""One file for each command of `medusa-serve`, imported by cli.py when that command is asked for.

A command reads its options, calls a room below it and prints. What it computes belongs to that room."""
