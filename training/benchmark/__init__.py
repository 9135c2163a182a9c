"""Rank pretrained backbones on a dermoscopic data set before any is fine-tuned."""
