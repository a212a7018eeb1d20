"""Steering: knowledge moved at decoding time, no weight changes."""
