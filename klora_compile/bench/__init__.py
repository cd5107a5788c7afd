"""What sampling with two LoRAs costs, each way to do it beside the others."""
