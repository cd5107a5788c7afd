"""Reports about a fusion: summary, inspection object, text map, plot, model card."""
