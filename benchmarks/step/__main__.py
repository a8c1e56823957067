"""Runs `python -m benchmarks.step`."""

from benchmarks.step.measure import main

main()
