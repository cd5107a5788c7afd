"""From a LoRA file to an adapter: key names by table, every key accounted for."""
