"""The forms in which trainers write a layer's delta, each in a file with its maths."""
