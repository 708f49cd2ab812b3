"""Training UNet++, and a study of it on made-up nuclei."""
