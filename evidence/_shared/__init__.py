"""What recipes share: small data sets as tensors, small networks, a character language model."""
