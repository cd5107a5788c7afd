"""The host diffusers: the handle, the clock, and what is watched while a fusion is applied."""
