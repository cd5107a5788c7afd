"""The host diffusers: the handle, the clock, and the watches of an applied fusion."""
