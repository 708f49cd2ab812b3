"""Fine-tune a language model to run with layers left out, as Unified Layer Skipping does."""
