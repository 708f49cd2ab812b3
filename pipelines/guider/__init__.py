"""Skip guidance as a guider of diffusers."""
