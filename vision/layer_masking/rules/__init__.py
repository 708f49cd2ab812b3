"""Rules: what each understood operation of torch becomes on masked activations; `table` says which rule is whose."""
