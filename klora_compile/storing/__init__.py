"""What an artifact stores of its factors: few bits of them, or where they lie."""
