"""Schedules that are searched, against those that are guessed."""
