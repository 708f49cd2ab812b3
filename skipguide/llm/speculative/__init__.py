"""Self-speculative decoding: the model with sublayers left out drafts, the whole model verifies."""
