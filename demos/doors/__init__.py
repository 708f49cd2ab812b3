"""The first picture of README and those of its three doors: each is understood at a glance, also when small."""
