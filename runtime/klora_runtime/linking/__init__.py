"""From the numbers of two LoRAs to timelines; without files, and without the compiler."""
