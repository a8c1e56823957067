"""Runs `python -m benchmarks.refresh`."""

from benchmarks.refresh.measure import main

main()
