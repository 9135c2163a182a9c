"""Dataset layouts on disk, brought to one canonical manifest, and its splits and cache."""
