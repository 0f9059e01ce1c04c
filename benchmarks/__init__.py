"""Measurements behind the documentation: `python -m benchmarks NAME`; results are under benchmarks/results."""
