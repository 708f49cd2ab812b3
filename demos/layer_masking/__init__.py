"""Layer masking: a small model on procedural scenes, the study of missingness, and a notebook."""
