"""The contract between training and serving: what a bundle is, and how an image is read."""
