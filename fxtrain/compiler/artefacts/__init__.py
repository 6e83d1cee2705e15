"""Compiled graphs as files, which other processes and machines load instead of compiling."""
