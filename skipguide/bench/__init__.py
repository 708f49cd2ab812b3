"""The honest table of a model: what is compared, scores, intervals, the report. `skipguide bench` runs it."""
