"""Random inputs for the families that ship, from a model's config."""
