"""Displacement fields (`fields`) and grids in physical space (`spaces`)."""
