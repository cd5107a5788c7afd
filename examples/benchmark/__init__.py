"""What klora costs, measured."""
