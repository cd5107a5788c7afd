"""Planning: from numbers of LoRAs to the slots and timeline of every layer."""
