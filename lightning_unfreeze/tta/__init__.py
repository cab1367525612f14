"""Views of an image, the answers to them, and what merging them gives."""
