"""Settings of users: a rule's own, those of all rules, and options of reading LoRA files."""
