"""Tests checkpointing systems under killed processes, failing disks, power cuts and damaged files."""
