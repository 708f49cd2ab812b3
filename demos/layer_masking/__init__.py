"""Layer masking: a small model on procedural scenes, and the study of missingness."""
