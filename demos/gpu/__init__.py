"""What skipguide costs and saves on a GPU: `python -m demos.gpu`."""
