"""The reference implementation of every op in plain PyTorch: readable before fast, in fp64 by default."""
