"""Benchmarks: a file for each value of ``benchmark=``, all of which are in suite.py."""
