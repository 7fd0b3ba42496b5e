"""Toybox: a small world of lit 3D toys in various places, rendered from seeds with captions and exact semantic maps."""
