"""Winnow's stages and what they stand on; `flows` runs them."""
