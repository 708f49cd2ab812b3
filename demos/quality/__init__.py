"""Does skip guidance help on the bundled model, with which layers, at what cost? Measured, with controls."""
