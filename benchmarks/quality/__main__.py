"""Runs `python -m benchmarks.quality`."""

from benchmarks.quality.measure import main

main()
