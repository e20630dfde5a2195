"""Measurements of speed and memory, and of what registration brings on real scans; see README.md."""
