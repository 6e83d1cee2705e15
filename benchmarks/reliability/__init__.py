"""Reliability: what becomes of checkpoints when processes are killed, disks fill up and bits flip, system by system."""
