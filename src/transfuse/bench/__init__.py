"""Benchmarks and studies: load a protocol, evaluate a model, report its metrics."""
