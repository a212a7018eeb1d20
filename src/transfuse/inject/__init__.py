"""Injection: documents and knowledge bases moved into adapters or weights."""
