"""What rules are made of: numbers to decide by, breakpoints, choices in common, papers."""
