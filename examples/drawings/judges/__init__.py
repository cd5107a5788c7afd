"""Judges of pictures that grain and blur do not move, and the paired flow loss."""
