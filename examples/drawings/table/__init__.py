"""The table of rules: rows, kept cells, candidates, pilot and a blind test."""
