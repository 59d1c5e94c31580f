"""The fast step: fused layers, loss and attention, each with plain PyTorch beside it."""
