"""The next bundled text-to-video model: a stock `WanPipeline` that is trained over several sessions."""
