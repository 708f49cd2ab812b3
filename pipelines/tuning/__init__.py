"""Tuning: a pass schedule that is searched on the user's own runs."""
