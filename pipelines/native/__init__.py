"""Native passes: the further passes that diffusers makes by itself, run from where they differ."""
