"""Perturbations: what weakens a block other than leaving it out. One entry in `at_parts` for each part of a plan."""
