"""Building blocks of rules: numbers of layers, breakpoints, common choices, papers."""
