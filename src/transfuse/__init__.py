"""transfuse moves knowledge between models, documents, graphs and clients, and measures what moved."""

__version__ = "0.1.0"
