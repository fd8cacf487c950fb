"""The definition of every op in plain PyTorch: readable before fast, computed in fp64 unless told otherwise."""
