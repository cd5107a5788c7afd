"""Whether what a search picks on tuning subjects holds on the reported ones."""
