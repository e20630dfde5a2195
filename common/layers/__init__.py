"""Network layers: warping, local correlation, recurrent updates and flow heads."""
