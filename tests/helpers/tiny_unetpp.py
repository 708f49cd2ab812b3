"""The widths of a tiny UNet++, and the count of a network's parameters."""

TINY = {"widths": (4, 8, 12, 16)}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())
