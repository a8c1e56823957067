"""Runs `python -m benchmarks.train`."""

from benchmarks.train.measure import main

main()
