"""What people see of a fusion: summary, inspection object, map in characters, plot."""
